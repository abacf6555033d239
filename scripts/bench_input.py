"""Speed of the input pipeline: audio-seconds decoded, resampled and batched per second and core; and the padding.

    python scripts/bench_input.py [--data DATA] [--codec opus,flac,wav] [--rate 48000] [--workers 1] [--grain] [--json]

The clips of DATA (default: the bundled prompts) are encoded anew with each codec at --rate, so that decoding and
resampling both count; then one epoch of batches is made with nothing cached. CPU seconds of the process are what is
divided by, so that other work on the machine does not count. --workers are decoding threads (the decoders release
Python's lock). With --grain (pip install grain) the same batches are also made by so many processes of Grain, the data
loader of MaxText; there only seconds by the clock can be compared, on a machine with nothing else to do.
"""
from __future__ import annotations

import argparse
import io
import json
import time

import numpy as np
import soundfile

from jaxslim import hub
from jaxslim.data import Batches, CTCTask, Rows, load_rows
from jaxslim.data.audio import resample

FORMATS = {"opus": ("OGG", "OPUS"), "flac": ("FLAC", "PCM_16"), "wav": ("WAV", "PCM_16"), "mp3": ("MP3", None)}


def encode(rows: Rows, codec: str, rate: int) -> Rows:
    out = []
    for i in range(len(rows)):
        file = io.BytesIO()
        kind, subtype = FORMATS[codec]
        soundfile.write(file, np.clip(resample(rows.audio(i), 16000, rate), -1, 1), rate, subtype, format=kind)
        out.append({"id": rows.column("id")[i], "audio": file.getvalue(), "text": rows.column("text")[i]})
    return Rows(out, f"{rows.name} as {codec}")


class Make:
    """Batch number k, in a process of Grain: the loader is made where it is used, as its threads cannot be sent."""

    def __init__(self, *args, **options):
        self.args, self.options, self.batches = args, options, None

    def __call__(self, k: int):
        if self.batches is None:
            self.batches = Batches(*self.args, **self.options)
            self.order = self.batches._plan.order(0)
        bucket, members = self.order[k]
        return self.batches._loader.batch(0, self.batches.shapes[bucket], members)


def by_grain(make: Make, count: int, workers: int) -> float:
    """Seconds of one epoch, from the second batch on: the processes have started by then."""
    import grain
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags
    data = grain.MapDataset.source(list(range(count))).map(make).to_iter_dataset(grain.ReadOptions(num_threads=0))
    stream = iter(data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)))
    next(stream)
    start = time.perf_counter()
    for _ in stream:
        pass
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="bundled:prompts-en/train")
    parser.add_argument("--codec", default="opus,flac,wav")
    parser.add_argument("--rate", type=int, default=48000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--grain", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows, task = load_rows(args.data), CTCTask.from_pretrained(hub.folder("bundled:wav2vec2-ctc-en"))
    results = []
    for codec in args.codec.split(","):
        data, options = encode(rows, codec, args.rate), dict(batch_size=args.batch_size, epochs=1, cache_bytes=0,
                                                             prefetch=0, seed=0)
        batches = Batches(data, task, workers=args.workers, **options)
        wall, cpu = time.perf_counter(), time.process_time()
        count = sum(1 for _ in batches)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        audio = batches.hours * 3600
        results.append({"codec": codec, "rate": args.rate, "audio_seconds": round(audio, 1), "batches": count,
                        "workers": args.workers, "audio_seconds_per_core_second": round(audio / cpu, 1),
                        "audio_seconds_per_second": round(audio / wall, 1),
                        "padding_waste": round(batches.padding_waste, 4)})
        if args.grain:
            seconds = by_grain(Make(data, task, workers=0, **options), count, args.workers)
            results[-1]["grain_audio_seconds_per_second"] = round(audio / seconds, 1)
        if not args.json:
            r = results[-1]
            print(f"{codec:5} {args.rate} Hz: {r['audio_seconds_per_core_second']:.0f} audio-seconds a second and core"
                  f" ({r['audio_seconds_per_second']:.0f} by the clock), padding {100 * r['padding_waste']:.1f} %"
                  + (f"; Grain {r['grain_audio_seconds_per_second']:.0f} by the clock" if args.grain else ""))
    if args.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
