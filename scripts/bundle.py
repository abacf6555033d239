"""Puts a trained model into checkpoints/ as a bundled one: half-precision weights, tokenizer and processor files.

    python scripts/bundle.py runs/teacher/final                      # -> checkpoints/wav2vec2-ctc-en
    python scripts/bundle.py SRC --name wav2vec2-ctc-en --source SRC_WITH_TOKENIZER

Stores float16 and says how many weights that changed beyond rounding; config.json keeps dtype float32, so
transformers and jaxslim open the model in fp32. The model card (README.md) already there is kept: edit its numbers.
"""
import argparse
import pathlib

import numpy as np

from jaxslim import hub

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", help="folder, hub id or bundled:NAME of the trained model")
    parser.add_argument("--name", default="wav2vec2-ctc-en")
    parser.add_argument("--source", help="where the tokenizer and processor files come from, if not SRC")
    args = parser.parse_args()
    model, target = hub.load(args.src), ROOT / "checkpoints" / args.name
    hub.save(model, target, source=args.source or args.src, dtype="float16")
    half = hub.load(target)
    worst = max(float(np.max(np.abs(np.asarray(half.params[k]) - np.asarray(v)) / (np.abs(np.asarray(v)) + 1e-4)))
                for k, v in model.params.items())
    print(f"{target}: {sum(v.size for v in half.params.values()):,} floats, "
          f"{(target / hub.WEIGHTS).stat().st_size / 1e6:.1f} MB, largest relative rounding {worst:.1e}")
    print(f"fingerprint {half.fingerprint}")


if __name__ == "__main__":
    main()
