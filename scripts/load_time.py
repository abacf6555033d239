"""How long a checkpoint takes from the page cache to arrays: hub.load beside a plain safetensors.numpy read.

    python scripts/load_time.py                       # wav2vec2-large, 1.26 GB -> docs/results/load_time.json
    python scripts/load_time.py --model whisper-small --repeats 9

The model has random weights and is written to a temporary folder first. Every measurement is a fresh process; imports
and the start of JAX are not counted, building the model's shapes and checking every weight are. Both take turns.
`ratio` is the median over turns of ours / plain; at most 1.5 is wanted.
"""
import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

import jax
import safetensors

from jaxslim import __version__, hub
from jaxslim.shapes import SHAPES
from jaxslim.spec import Spec
from jaxslim.speed_worker import _cpu, random_model

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "docs" / "results" / "load_time.json"
OURS = """
import sys, time, jax
from jaxslim import hub
jax.block_until_ready(jax.numpy.zeros(1))
start = time.perf_counter()
model = hub.load(sys.argv[1])
jax.block_until_ready(model.params)
print(time.perf_counter() - start)
"""
PLAIN = """
import sys, time
from safetensors.numpy import load_file
start = time.perf_counter()
arrays = load_file(sys.argv[1] + "/model.safetensors")
print(time.perf_counter() - start)
"""


def seconds(code: str, folder: str) -> float:
    """What one fresh process says."""
    done = subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True, text=True)
    return float(done.stdout)


def measure(name: str, repeats: int) -> dict:
    from transformers import CONFIG_MAPPING

    family, head, changes = SHAPES[name]
    with tempfile.TemporaryDirectory() as tmp:
        spec = Spec(CONFIG_MAPPING[family](**changes).to_dict(), family, head)  # every key, as a published config has
        hub.save(random_model(spec), tmp + "/model")
        file = pathlib.Path(tmp, "model", "model.safetensors")
        file.read_bytes()  # into the page cache
        times = {"plain": [], "ours": []}
        for _ in range(repeats):
            for kind, code in (("plain", PLAIN), ("ours", OURS)):
                times[kind].append(seconds(code, tmp + "/model"))
        size = file.stat().st_size
    ratio = statistics.median(a / b for a, b in zip(times["ours"], times["plain"], strict=True))
    return {"model": name, "bytes": size, "ours_seconds": statistics.median(times["ours"]),
            "plain_seconds": statistics.median(times["plain"]), "ratio": ratio, "wanted": 1.5, "ok": ratio <= 1.5,
            "times": times, "load": round(os.getloadavg()[0], 2), "device": _cpu(),
            "versions": {"jaxslim": __version__, "python": platform.python_version(), "jax": jax.__version__,
                         "safetensors": safetensors.__version__},
            "command": f"python scripts/load_time.py --model {name} --repeats {repeats}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wav2vec2-large-lv60", choices=list(SHAPES), metavar="NAME",
                        help=", ".join(SHAPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    row = measure(args.model, args.repeats)
    rows = json.loads(args.output.read_text()) if args.output.exists() else []
    rows = [r for r in rows if (r["model"], r["device"]) != (row["model"], row["device"])] + [row]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{row['model']}: {row['bytes'] / 1e9:.2f} GB, ours {row['ours_seconds']:.2f} s, plain "
          f"{row['plain_seconds']:.2f} s, ratio {row['ratio']:.2f} (load average {row['load']})")
    return 0 if row["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
