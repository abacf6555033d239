"""Training steps beside Hugging Face PyTorch on one device: CTC fine-tuning, layerwise distillation; random weights.

    python scripts/step_speed.py --model wav2vec2-base --step ctc --seconds 30 --batch-size 16 --dtype bfloat16

Engines (--engines): jaxslim; torch (sdpa attention, autocast, fused AdamW); torch-compile (the same, compiled). Each
runs in a process of its own. JSON rows: first step (with compilation), median of --repeats steps after three, peak
memory of the device (on a CPU the largest RSS of the process), and `mfu`: the FLOPs of the model (as in the dry run,
without what remat repeats) over time and the device's dense bf16 peak, where that is known. `vs_torch` is PyTorch's
time over the engine's. The feature extractor is frozen; distillation is LN-MSE of every layer and KL of the logits.
"""
from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

MODELS = ("wav2vec2-base", "wav2vec2-large-lv60")  # of jaxslim.shapes
TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "V100": 125}  # dense, by data sheets
LABELS = 256


def config(args) -> dict:
    from jaxslim.shapes import SHAPES

    quiet = dict(mask_time_prob=0.0, layerdrop=0.0, vocab_size=32, ctc_loss_reduction="mean", ctc_zero_infinity=True)
    return quiet | SHAPES[args.model][2] | ({"num_hidden_layers": args.layers} if args.layers else {})


def rows(args) -> dict:
    import numpy as np

    rng, samples = np.random.default_rng(0), round(args.seconds * 16000)
    labels = rng.integers(5, 32, (args.batch_size, min(LABELS, int(args.seconds * 15)))).astype(np.int32)
    return {"input_values": rng.standard_normal((args.batch_size, samples)).astype(np.float32),
            "attention_mask": np.ones((args.batch_size, samples), np.int32), "labels": labels}


def setup_jaxslim(args):
    """(a call that makes one step, one that says the peak bytes, facts)"""
    import jax

    from jaxslim.config import Group, Train
    from jaxslim.methods.finetune import Finetune
    from jaxslim.methods.linearize import Linearize
    from jaxslim.slim import Slim
    from jaxslim.spec import Spec
    from jaxslim.speed_worker import _cpu, _versions, random_model
    from jaxslim.train import dryrun
    from jaxslim.train import mesh as M
    from jaxslim.train import step as S

    model = random_model(Spec(config(args), "wav2vec2", "ctc"))
    distill = args.step == "distill"
    method = Linearize(layers=(), logit_weight=1.0) if distill else Finetune(freeze=("feature_extractor",))
    mesh = M.make("data=1", jax.devices()[:1])
    cfg = Train(groups={"main": Group(1e-5)}, max_steps=1000, dtype=args.dtype, teacher_dtype=args.dtype,
                remat=args.remat, prng="hash")
    state, frozen, tx = S.init(method, model, cfg, mesh)
    run = S.make(method, model.spec, tx, cfg, state, mesh)
    guide = None
    if distill:
        guide = Slim(model.spec, M.place({k: v.astype(args.dtype) for k, v in model.params.items()}, mesh))
    batch, device = M.batch(rows(args), mesh), jax.devices()[0]
    flops = dryrun.model_flops(method, model, guide and model, args.seconds, args.batch_size)

    def step():
        nonlocal state
        state, metrics = run(state, frozen, guide, batch)
        return float(metrics["loss"])

    def peak():
        return (device.memory_stats() or {}).get("peak_bytes_in_use")

    cpu = device.platform == "cpu"
    return step, peak, {"device": _cpu() if cpu else device.device_kind, "model_flops": flops,
                        "versions": _versions("jax", "jaxlib", "flax")}


def setup_torch(args):
    import copy

    import torch
    import torch.nn.functional as F
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Wav2Vec2ForCTC._from_config(Wav2Vec2Config(**config(args)), attn_implementation="sdpa").to(device).train()
    model.freeze_feature_encoder()
    teacher = copy.deepcopy(model).eval().to(getattr(torch, args.dtype)) if args.step == "distill" else None
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-5, fused=True)
    batch = {k: torch.from_numpy(v).to(device) for k, v in rows(args).items()}
    batch["labels"] = batch["labels"].long()
    sound = {k: batch[k] for k in ("input_values", "attention_mask")}

    def loss():
        with torch.autocast(device, getattr(torch, args.dtype), enabled=args.dtype != "float32"):
            out = model(**batch, output_hidden_states=teacher is not None)
        if teacher is None:
            return out.loss
        with torch.no_grad():
            cast = sound | {"input_values": sound["input_values"].to(teacher.dtype)}
            want = teacher(**cast, output_hidden_states=True)
        norm = lambda x: F.layer_norm(x.float(), x.shape[-1:])  # noqa: E731
        states = [F.mse_loss(norm(a), norm(b)) for a, b in zip(out.hidden_states[1:], want.hidden_states[1:])]
        logits = [x.logits.float().log_softmax(-1).flatten(0, 1) for x in (out, want)]
        return out.loss + torch.stack(states).mean() + F.kl_div(*logits, log_target=True, reduction="batchmean")

    run = torch.compile(loss) if args.engine == "torch-compile" else loss

    def step():
        optimizer.zero_grad(set_to_none=True)
        value = run()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return value.item()

    from jaxslim.speed_worker import _cpu, _versions

    name = torch.cuda.get_device_name() if device == "cuda" else _cpu()
    return step, lambda: torch.cuda.max_memory_allocated() if device == "cuda" else None, {
        "device": name, "versions": _versions("torch", "transformers")}


def measure(args) -> dict:
    step, peak, facts = (setup_jaxslim if args.engine == "jaxslim" else setup_torch)(args)
    times = []
    for _ in range(3 + args.repeats):
        started = time.perf_counter()
        loss = step()
        times.append(time.perf_counter() - started)
    return {"engine": args.engine, "model": args.model, "step": args.step, "seconds": args.seconds,
            "batch_size": args.batch_size, "dtype": args.dtype, "remat": args.remat, "first_seconds": times[0],
            "step_seconds": statistics.median(times[3:]), "min_seconds": min(times[3:]), "max_seconds": max(times[3:]),
            "hours_per_hour": args.seconds * args.batch_size / statistics.median(times[3:]), "loss": loss,
            "peak_bytes": peak() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, **facts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="wav2vec2-base")
    parser.add_argument("--step", choices=("ctc", "distill"), default="ctc")
    parser.add_argument("--engines", default="jaxslim,torch,torch-compile")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--remat", default="none", help="of jaxslim's step")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers, to try the script out")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--engine", help=argparse.SUPPRESS)  # one engine, in a process of its own
    args = parser.parse_args()
    if args.engine:
        print(json.dumps(measure(args)))
        return
    found = []
    for engine in args.engines.split(","):
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--engine", engine], stdout=subprocess.PIPE,
                              text=True)
        if done.returncode:
            found.append({"engine": engine, "model": args.model, "step": args.step, "error": f"exit {done.returncode}"})
        else:
            found.append(json.loads(done.stdout.splitlines()[-1]))
    flops = next((r["model_flops"] for r in found if "model_flops" in r), None)
    base = next((r["step_seconds"] for r in found if r["engine"] == "torch" and "step_seconds" in r), None)
    for r in found:
        peak = next((t for name, t in TFLOPS.items() if name in r.get("device", "")), None)
        if "step_seconds" in r and base:
            r["vs_torch"] = base / r["step_seconds"]
        if "step_seconds" in r and flops and peak:
            r["mfu"] = flops / r["step_seconds"] / (peak * 1e12)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
