"""Puts a trained model into checkpoints/ as a bundled one, weights in half precision; or speech into the package.

    python scripts/bundle.py runs/teacher/final          # -> checkpoints/wav2vec2-ctc-en, in place of the old weights
    python scripts/bundle.py runs/a/final runs/b/final   # the mean of the parameters of models of one training
    python scripts/bundle.py prompts --prompts           # -> jaxslim/assets/prompts-{es,fr,it,ru}/{train,test}.parquet
    python scripts/bundle.py heldout.parquet --general test            # -> jaxslim/assets/synthetic-en/test.parquet
    python scripts/bundle.py flite.parquet+piper.parquet --general train # -> jaxslim/assets/synthetic-en/train.parquet

config.json keeps dtype float32, so transformers and jaxslim open the model in fp32. Tokenizer, processor and NOTICE of
the model already there stay (of SRC for a new name), and so does its card: edit the numbers in its README.md. Then
    python -m pytest tests/test_parity.py -k bundled -m "slow or not slow"

With --prompts SRC is a folder with LANG/train.parquet (Asterisk core sounds, 16 kHz Ogg/Opus; the columns of
prompts-en, no text). Of the clips of 1 to 6 s, 120 at equal distances in the order of their ids are taken, every third
for test. With --general SRC is Parquet files with texts, of which 100 clips (train: 200 of each) are taken in the same
way. The bytes of the audio stay as they are. NOTICE and README.md of the folders are written by hand.
"""
import argparse
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxslim import hub

ROOT = pathlib.Path(__file__).resolve().parents[1]
LANGUAGES, CLIPS, SECONDS = ("es", "fr", "it", "ru"), 120, (1.0, 6.0)
GENERAL = {"test": 100, "train": 200}   # clips of each file
COLUMNS = ("id", "audio", "speaker", "language", "duration")


def prompts(source: pathlib.Path, target: pathlib.Path) -> None:
    """target/prompts-LANG/{train,test}.parquet of source/LANG/train.parquet."""
    for language in LANGUAGES:
        table = pq.read_table(source / language / "train.parquet", columns=list(COLUMNS)).sort_by("id")
        length = table["duration"]
        table = table.filter(pc.and_(pc.greater_equal(length, SECONDS[0]), pc.less_equal(length, SECONDS[1])))
        index = np.linspace(0, table.num_rows - 1, min(CLIPS, table.num_rows)).round().astype(int)
        folder = target / f"prompts-{language}"
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in (("train", np.delete(index, np.s_[2::3])), ("test", index[2::3])):
            part = table.take(rows)
            pq.write_table(part, folder / f"{split}.parquet", compression="none")
            print(f"{folder / split}: {part.num_rows} clips, {pc.sum(part['duration']).as_py() / 60:.1f} min")


def general(sources: str, split: str, folder: pathlib.Path) -> None:
    parts = []
    for source in sources.split("+"):
        table = pq.read_table(source, columns=[*COLUMNS[:2], "text", *COLUMNS[2:]]).sort_by("id")
        parts.append(table.take(np.linspace(0, table.num_rows - 1, GENERAL[split]).round().astype(int)))
    part = pa.concat_tables(parts)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(part, folder / f"{split}.parquet", compression="none")
    print(f"{folder / split}: {part.num_rows} clips, {pc.sum(part['duration']).as_py() / 60:.1f} min")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", nargs="+", help="folder, hub id or bundled:NAME of the trained model")
    parser.add_argument("--name", default="wav2vec2-ctc-en")
    parser.add_argument("--prompts", action="store_true", help="SRC is a folder of prompts, LANG/train.parquet")
    parser.add_argument("--general", choices=GENERAL, help="SRC is Parquet files of other speech, for this split")
    parser.add_argument("--assets", type=pathlib.Path, default=ROOT / "jaxslim/assets", help="where prompts go")
    args = parser.parse_args()
    if args.general:
        return general(args.src[0], args.general, args.assets / "synthetic-en")
    if args.prompts:
        return prompts(pathlib.Path(args.src[0]), args.assets)
    models, target = [hub.load(src) for src in args.src], ROOT / "checkpoints" / args.name
    mean = {k: np.mean([np.asarray(m.params[k], np.float64) for m in models], 0) for k in models[0].params}
    model = models[0].replace(params={k: v.astype(np.float32) for k, v in mean.items()})
    hub.save(model, target, source=target if target.exists() else args.src[0], dtype="float16")
    half = hub.load(target)
    worst = max(float(np.max(np.abs(np.asarray(half.params[k]) - np.asarray(v)) / (np.abs(np.asarray(v)) + 1e-4)))
                for k, v in model.params.items())
    print(f"{target}: {sum(v.size for v in half.params.values()):,} floats, "
          f"{(target / hub.WEIGHTS).stat().st_size / 1e6:.1f} MB, largest relative rounding {worst:.1e}")
    print(f"fingerprint {half.fingerprint}")


if __name__ == "__main__":
    main()
