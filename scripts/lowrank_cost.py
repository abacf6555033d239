"""What calibrating Q-K and V-O costs beyond a forward pass, at the shape of whisper-large-v3's encoder, random weights.

    python scripts/lowrank_cost.py [--layers 32] [--width 1280] [--heads 20] [--ffn 5120] [--repeats 3]

One 30 s window, float32. Prints one JSON object: seconds of the forward pass and of the calibrating one (median of
calls in turn), seconds of factorising every layer, and bytes: XLA's temporary memory of both programs and the sums kept
on the host in double precision; `extra_bytes` is what calibration needs beyond the forward pass. Wants 6 GB and a quiet
machine.
"""
from __future__ import annotations

import argparse
import json
import statistics
import time

import jax
import numpy as np
from transformers import WhisperConfig

from jaxslim.methods import calibrate, factor
from jaxslim.models import bind
from jaxslim.slim import Slim
from jaxslim.spec import Spec
from jaxslim.speed_worker import _cpu, _versions, cpu_numbers, random_model
from jaxslim.train import mesh as M


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 32), ("width", 1280), ("heads", 20), ("ffn", 5120), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    config = WhisperConfig(
        d_model=args.width, encoder_layers=args.layers, encoder_attention_heads=args.heads, encoder_ffn_dim=args.ffn,
        num_mel_bins=128, decoder_layers=1, decoder_attention_heads=args.heads, decoder_ffn_dim=8, vocab_size=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None)  # the decoder is next to nothing: it is not what is measured
    model = random_model(Spec(config.to_dict(), "whisper", "none"))
    spec, mesh = model.spec, M.make("data=1", jax.devices()[:1])
    params = M.place(model.params, mesh)
    batch = {"input_features": np.random.default_rng(0).standard_normal((1, 128, 3000)).astype(np.float32),
             "decoder_input_ids": np.ones((1, 1), np.int32)}
    wanted = {f"encoder.{i}.attention": ("qk", "vo") for i in range(args.layers)}
    given = {**batch, "real": np.ones(1, bool)}
    measure = calibrate.program(spec, tuple(wanted.items()), mesh).lower(params, given).compile()
    forward = jax.jit(lambda params, batch: Slim(spec, params)(**batch).encoder_last_hidden_state)
    forward = forward.lower(params, batch).compile()
    temporary = {name: p.memory_analysis().temp_size_in_bytes for name, p in (("forward", forward),
                                                                             ("calibrate", measure))}
    times: dict[str, list[float]] = {"forward": [], "calibrate": []}
    for _ in range(args.repeats + 1):
        for name, call in (("forward", lambda: forward(params, batch)), ("calibrate", lambda: measure(params, given))):
            started = time.perf_counter()
            sums = jax.block_until_ready(call())
            times[name].append(time.perf_counter() - started)
    seconds = {name: statistics.median(t[1:]) for name, t in times.items()}
    sums = {b: {k: np.asarray(v, np.float64) for k, v in s.items()} for b, s in jax.device_get(sums).items()}
    moments = {b: {k: v / s["n"] for k, v in s.items() if not k.startswith("n")} for b, s in sums.items()}
    host = {k: np.asarray(v) for k, v in model.params.items()}
    started = time.perf_counter()
    found = [c for b in wanted for c in factor.curves(spec, host, moments[b], b, wanted[b])]
    factored = time.perf_counter() - started
    started = time.perf_counter()
    cut = spec
    for c in found:
        cut, host = c.cut(cut, host, c.full // 2)
    bind.check(cut, host)
    kept = sum(v.nbytes for s in sums.values() for v in s.values())
    out = measure.memory_analysis().output_size_in_bytes
    print(json.dumps({
        "shape": f"whisper encoder {args.layers} x {args.width}", "audio_seconds": 30,
        "heads_in_all": args.layers * args.heads,
        "forward_seconds": seconds["forward"], "calibrate_seconds": seconds["calibrate"],
        "factor_seconds": factored, "cut_seconds": time.perf_counter() - started,
        "extra_seconds": seconds["calibrate"] - seconds["forward"] + factored,
        "forward_bytes": temporary["forward"], "calibrate_bytes": temporary["calibrate"], "sums_bytes": kept,
        "extra_bytes": max(0, temporary["calibrate"] - temporary["forward"]) + out + kept,
        "device": _cpu(), "threads": len(cpu_numbers()), "versions": _versions("jax", "jaxlib", "numpy")}))


if __name__ == "__main__":
    main()
