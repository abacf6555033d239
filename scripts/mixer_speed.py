"""Time of sequence mixers beside that of their matrix products alone, and of SSD beside its roofline and a plain scan.

    python scripts/mixer_speed.py --mixers softmax,elu,mamba2 [--seconds 10,60] [--shape wav2vec2-base]
    python scripts/mixer_speed.py --ssd [--seconds 10,60]

--mixers: an attention block of a stock shape with that mixer, batch 1, float32, random weights. Matrix products
alone: each one that the traced program has, by itself on random numbers, as often as it runs there; the sum of their
times.
--ssd: `scan.ssd` of CALD's Mamba-2 (16 heads of 64, state 128), forward and with gradients: a chunk after
another, as on a CPU, its matrix products alone, all chunks together, `associative_scan` over all states (to 10 s: it
holds a state a frame), and a step for each frame. Roofline: the larger of the products' time at the rate of one large
product and the inputs' and outputs' time at the rate of a copy, both measured here. Times are medians of --repeats
calls in turn. Prints a JSON list.
"""
from __future__ import annotations

import argparse
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim import cost
from jaxslim.models import bind, roles, scan
from jaxslim.models import layers as L
from jaxslim.shapes import SHAPES
from jaxslim.spec import Spec
from jaxslim.speed_worker import _cpu, _versions, cpu_numbers, random_model

MIXERS = {"softmax": ("softmax", {}), "elu": ("elu", {}), "t2r": ("t2r", {}), "hedgehog": ("hedgehog", {}),
          "window": ("hedgehog", {"window": 16}), "causal": ("hedgehog", {"causal": True}),
          "linformer": ("linformer", {"length": 3000, "features": 64}), "mamba2": ("mamba2", {}),
          "mamba": ("mamba", {}), "hydra": ("mamba2", {"direction": "shared"}), "gla": ("gla", {}),
          "gated_deltanet": ("gated_deltanet", {})}
FRAMES, SSD = 50, (16, 64, 1, 128)   # frames a second; heads, P, groups, N
STATES = 500                         # frames up to which all states are held


def medians(programs: dict, repeats: int) -> dict[str, tuple[float, float, float]]:
    """name -> (median, least, most) seconds of (jitted function, arguments), called in turn after a first call."""
    times = {name: [] for name in programs}
    for turn in range(repeats + 1):
        for name, (fn, args) in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(fn(*args))
            if turn:
                times[name].append(time.perf_counter() - began)
    return {name: (statistics.median(t), min(t), max(t)) for name, t in times.items()}


def draw(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def alone(fn, args, repeats: int) -> tuple[float, int]:
    """(seconds of the matrix products that fn(*args) has, MACs). Those of a loop run in a loop."""
    total = macs = 0
    for (eqn, times), count in _counted(cost.products(jax.make_jaxpr(fn)(*args))).values():
        def product(a, b, eqn=eqn):
            return eqn.primitive.bind(a, b, **eqn.params)

        shapes = [v.aval.shape for v in eqn.invars]
        loop = product if times == 1 else lambda a, b, product=product: jax.lax.map(lambda x: product(*x), (a, b))
        operands = [draw(s if times == 1 else (times, *s), i) for i, s in enumerate(shapes)]
        total += count * medians({"": (jax.jit(loop), operands)}, repeats)[""][0]
        macs += count * times * cost.eqn_macs(eqn)
    return total, macs


def _counted(found) -> dict:
    """Equal products once, with their number."""
    out = {}
    for eqn, times in found:
        key = (times, eqn.primitive.name, str(eqn.params), *(v.aval.shape for v in eqn.invars))
        out[key] = ((eqn, times), out.get(key, (None, 0))[1] + 1)
    return out


def mixer_rows(names: list[str], shape: str, seconds: list[float], repeats: int) -> list[dict]:
    family, head, config = SHAPES[shape]
    rows = []
    for name in names:
        mixer, options = MIXERS[name]
        spec = Spec({**config, "num_hidden_layers": 1}, family, head)
        block = next(b for b in roles.blocks(spec) if b.endswith(".attention"))
        model = random_model(spec.with_block(block, mixer=mixer, options=options))
        owner = roles.roles(model.spec, block)["owner"]

        def run(params, x, spec=model.spec, owner=owner):
            return bind.submodule(bind.bind(spec, params), owner)(x, None, L.Call())

        for s in seconds:
            args = (model.params, draw((1, round(s * FRAMES), model.spec["hidden_size"])))
            (middle, least, most), = medians({name: (jax.jit(run), args)}, repeats).values()
            products, macs = alone(run, args, repeats)
            rows.append({"mixer": name, "pass": "forward", "shape": shape, "audio_seconds": s, "steady_seconds": middle,
                         "min_seconds": least, "max_seconds": most, "product_seconds": products,
                         "ratio": middle / products, "gmacs": macs / 1e9})
    return rows


def rates(repeats: int) -> tuple[float, float]:
    """(MACs a second of a product of two 2,048 x 2,048, bytes a second read and written by a copy of 256 MB)."""
    a, b, long = draw((2048, 2048)), draw((2048, 2048), 1), draw((1 << 26,))
    found = medians({"product": (jax.jit(jnp.matmul), (a, b)), "copy": (jax.jit(jnp.negative), (long,))}, repeats)
    return 2048**3 / found["product"][1], 2 * long.nbytes / found["copy"][1]


def by_states(x, dt, a, b, c) -> jax.Array:
    """SSD by an associative scan over whole states, the plain way to write it."""
    group = x.shape[2] // b.shape[2]
    b, c = (jnp.repeat(v, group, 2) for v in (b, c))
    decay = jnp.broadcast_to(jnp.exp(dt * a)[..., None, None], (*x.shape, b.shape[-1]))      # (B, T, H, P, N)
    added = (dt[..., None] * x)[..., None] * b[..., None, :]
    _, states = jax.lax.associative_scan(lambda f, s: (f[0] * s[0], f[1] * s[0] + s[1]), (decay, added), axis=1)
    return (states * c[..., None, :]).sum(-1)


def by_frames(x, dt, a, b, c) -> jax.Array:
    """SSD a frame at a time."""
    group = x.shape[2] // b.shape[2]

    def step(state, now):
        x, dt, b, c = now
        b, c = (jnp.repeat(v, group, 1) for v in (b, c))
        state = jnp.exp(dt * a)[..., None, None] * state + (dt[..., None] * x)[..., None] * b[..., None, :]
        return state, (state * c[..., None, :]).sum(-1)

    state = jnp.zeros((x.shape[0], *x.shape[2:], b.shape[-1]))
    return jnp.moveaxis(jax.lax.scan(step, state, [jnp.moveaxis(v, 1, 0) for v in (x, dt, b, c)])[1], 0, 1)


def ssd_rows(seconds: list[float], repeats: int) -> list[dict]:
    heads, size, groups, width = SSD
    peak, copy = rates(repeats)
    rows = []
    for s in seconds:
        frames = round(s * FRAMES)
        args = (draw((1, frames, heads, size)), jax.nn.softplus(draw((1, frames, heads), 1) - 3),
                -jnp.linspace(1, 16, heads), draw((1, frames, groups, width), 2), draw((1, frames, groups, width), 3))
        forms = {"chunked": lambda *v: scan.ssd(*v, in_turn=True)[0], "together": lambda *v: scan.ssd(*v)[0],
                 "associative scan": by_states, "frame by frame": by_frames}
        if frames > STATES:
            del forms["associative scan"]
        forward_bytes = sum(v.nbytes for v in args) + args[0].nbytes
        for name, wrap, moved in (("forward", lambda fn: fn, forward_bytes),
                                  ("forward and gradients", with_gradients, 2 * forward_bytes)):
            programs = {form: (jax.jit(wrap(fn)), args) for form, fn in forms.items()}
            results = [fn(*v) for fn, v in programs.values()]
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-3), results[0], results[-1])
            times = medians(programs, repeats)
            products, macs = alone(wrap(forms["chunked"]), args, repeats)
            bounds = {"products": macs / peak, "memory": moved / copy}
            bound = max(bounds, key=bounds.get)
            middle, least, most = times.pop("chunked")
            rows.append({"mixer": "ssd", "pass": name, "audio_seconds": s, "steady_seconds": middle,
                         "min_seconds": least, "max_seconds": most, "product_seconds": products,
                         "ratio": middle / products, "gmacs": macs / 1e9, "bound": bound,
                         "bound_seconds": bounds[bound], "of_roofline": bounds[bound] / middle, "peak_macs": peak,
                         "copy_bytes": copy, **{f"{form.split()[0]}_seconds": t[0] for form, t in times.items()}})
    return rows


def with_gradients(fn):
    return jax.value_and_grad(lambda *v: jnp.square(fn(*v)).mean(), argnums=(0, 1, 2, 3, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", default="", help=f"of {', '.join(MIXERS)}")
    parser.add_argument("--ssd", action="store_true")
    parser.add_argument("--seconds", default="10,60")
    parser.add_argument("--shape", default="wav2vec2-base", choices=SHAPES)
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args()
    names, seconds = [n for n in args.mixers.split(",") if n], [float(s) for s in args.seconds.split(",")]
    if unknown := [n for n in names if n not in MIXERS]:
        parser.error(f"unknown mixers {', '.join(unknown)}; known are {', '.join(MIXERS)}")
    rows = mixer_rows(names, args.shape, seconds, args.repeats) + (ssd_rows(seconds, args.repeats) if args.ssd else [])
    here = {"device": _cpu(), "threads": len(cpu_numbers()), "versions": _versions("jax", "jaxlib")}
    print(json.dumps([{**row, **here} for row in rows], indent=1))


if __name__ == "__main__":
    main()
