"""A published Whisper checkpoint beside PyTorch transformers on real speech: greedy transcripts of every test clip.

    python scripts/parity_whisper.py openai/whisper-tiny.en [--data bundled:prompts-en/test] [--language en]

Each side has its own features, decoding and tokenizer. A row of docs/results/parity_whisper.json: clips, how many
transcripts are equal as strings, those that are not, word error rates (Whisper's English normaliser), seconds of all
clips one at a time (after the first pass of ours, which compiles). Needs torch.
"""
from __future__ import annotations

import argparse
import json
import logging
import pathlib
import platform
import time

import torch
import transformers

from jaxslim import hub
from jaxslim.data import load_rows
from jaxslim.evaluate import evaluate
from jaxslim.speed_worker import _cpu, _versions, cpu_numbers

RESULTS = pathlib.Path(__file__).parents[1] / "docs/results/parity_whisper.json"


def reference(name: str, rows, language: str | None) -> tuple[list[str], float]:
    """Transcripts of PyTorch, and the seconds they took."""
    folder = hub.folder(name)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    features = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    tokenizer, texts, started = transformers.WhisperTokenizerFast.from_pretrained(folder), [], time.perf_counter()
    for i in range(len(rows)):
        wave = rows.audio(i)
        long = len(wave) > features.n_samples
        x = features(wave, sampling_rate=16000, return_tensors="pt", truncation=not long, return_attention_mask=True,
                     padding="longest" if long else "max_length")
        options = {"language": language} if language else {}
        with torch.no_grad():
            ids = model.generate(x.input_features, attention_mask=x.attention_mask, return_timestamps=long, **options)
        texts.append(" ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split()))
    return texts, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default="bundled:prompts-en/test")
    parser.add_argument("--language")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows = load_rows(args.data)
    run = lambda: evaluate(args.model, rows, language=args.language, batch_size=1, progress=False,  # noqa: E731
                           normalize="whisper-english")
    run()
    found = run()
    ours = {u["id"]: " ".join(u["pred_text"].split()) for u in found.utterances}
    theirs, seconds = reference(args.model, rows, args.language)
    ids = rows.column("id")
    different = [{"id": i, "ours": ours[i], "torch": t} for i, t in zip(ids, theirs, strict=True) if ours[i] != t]
    row = {"model": args.model, "fingerprint": hub.load(args.model).fingerprint, "data": args.data,
           "language": args.language, "clips": len(ids), "equal": len(ids) - len(different), "different": different,
           "wer": found["wer"], "wer_low": found["wer_low"], "wer_high": found["wer_high"], "words": found["words"],
           "normalize": found["normalize"], "audio_seconds": found["audio_seconds"], "seconds": found["seconds"],
           "torch_seconds": seconds, "command": f"python scripts/parity_whisper.py {args.model}"
           + (f" --language {args.language}" if args.language else ""), "device": _cpu(), "threads": len(cpu_numbers()),
           "versions": {**_versions("jax", "flax", "torch", "transformers"), "python": platform.python_version()}}
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([r for r in old if r["command"] != row["command"]] + [row], indent=1) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
