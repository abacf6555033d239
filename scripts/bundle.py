"""Puts a trained model into checkpoints/ as a bundled one, weights in half precision.

    python scripts/bundle.py runs/teacher/final            # -> checkpoints/wav2vec2-ctc-en, in place of the old weights

config.json keeps dtype float32, so transformers and jaxslim open the model in fp32. Tokenizer, processor and NOTICE of
the model already there stay (of SRC for a new name), and so does its card: edit the numbers in its README.md. Then
    python -m pytest tests/test_parity.py -k bundled -m "slow or not slow"
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
    args = parser.parse_args()
    model, target = hub.load(args.src), ROOT / "checkpoints" / args.name
    hub.save(model, target, source=target if target.exists() else args.src, dtype="float16")
    half = hub.load(target)
    worst = max(float(np.max(np.abs(np.asarray(half.params[k]) - np.asarray(v)) / (np.abs(np.asarray(v)) + 1e-4)))
                for k, v in model.params.items())
    print(f"{target}: {sum(v.size for v in half.params.values()):,} floats, "
          f"{(target / hub.WEIGHTS).stat().st_size / 1e6:.1f} MB, largest relative rounding {worst:.1e}")
    print(f"fingerprint {half.fingerprint}")


if __name__ == "__main__":
    main()
