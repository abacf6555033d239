"""Full-size encoders against PyTorch transformers: every hidden state and the logits, fp32, random weights.

    python scripts/parity.py                 # all models on this machine's device -> docs/results/parity.json
    python scripts/parity.py wav2vec2-base --seconds 10

A row's `largest` is the worst of max difference / max(1, max abs of the reference); at most 1e-4 passes. Rows of the
same model, length and device are replaced. On GPU the products run at full fp32 (`jax_default_matmul_precision`).
"""
import argparse
import json
import os
import pathlib
import platform
import sys
import tempfile
import time

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import flax  # noqa: E402
import jax  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from jaxslim import __version__, hub  # noqa: E402
from jaxslim.architectures import architecture  # noqa: E402
from jaxslim.shapes import SHAPES  # noqa: E402

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "docs" / "results" / "parity.json"
# of Whisper the whole encoder and one layer of the decoder
MODELS = {name: (family, head, changes | ({"decoder_layers": 1} if family == "whisper" else {}))
          for name, (family, head, changes) in SHAPES.items()}


def measure(name: str, seconds: float) -> dict:
    family, head, changes = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, architecture(family, head))(transformers.CONFIG_MAPPING[family](**changes)).eval()
    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(tmp)
        del model
        rows = hub.compare(hub.load(tmp), tmp, seconds)
    ratio = {tap: difference / max(1.0, scale) for tap, difference, scale, _ in rows}
    worst = max(ratio, key=ratio.get)
    device = jax.devices()[0]
    return {
        "model": name, "seconds": seconds, "layers": sum(tap.startswith("encoder.") for tap in ratio),
        "largest": ratio[worst], "at": worst, "logits": ratio["logits"], "tolerance": 1e-4,
        "ok": all(r[-1] for r in rows),
        "device": device.device_kind if device.platform != "cpu" else f"cpu ({platform.machine()})",
        "versions": {"jaxslim": __version__, "python": platform.python_version(), "jax": jax.__version__,
                     "flax": flax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "command": f"python scripts/parity.py {name} --seconds {seconds:g}",
        "taps": {tap: [difference, scale] for tap, difference, scale, _ in rows},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--seconds", type=float, default=2.0, help="length of the random waveform")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    if unknown := set(args.models) - set(MODELS):
        parser.error(f"unknown model {', '.join(unknown)}; known are {', '.join(MODELS)}")
    jax.config.update("jax_default_matmul_precision", "highest")
    rows = json.loads(args.output.read_text()) if args.output.exists() else []
    for name in args.models:
        start = time.perf_counter()
        row = measure(name, args.seconds)
        print(f"{name:22} {args.seconds:g} s  largest {row['largest']:.1e} at {row['at']}, logits {row['logits']:.1e}  "
              f"{'ok' if row['ok'] else 'FAILED'}  ({time.perf_counter() - start:.0f} s)", flush=True)
        key = ("model", "seconds", "device")
        rows = [r for r in rows if [r[k] for k in key] != [row[k] for k in key]] + [row]
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(r["ok"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
