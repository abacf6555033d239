"""`layers: scan`: runs of equal layers as one loop, so that a step compiles as fast as one layer does.

The parameters keep their names; they are stacked inside the trace (a copy of the weights in the compute dtype) and
every layer of a run reads its slice. Layers that differ (pruned widths, other mixers, WavLM's first) run as before.
Dropout draws other numbers than without the loop.
"""
from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxslim.models import layers as L

SITE = 2000  # of the random keys of a run; a layer folds its own sites into them


def run(layers, x: jax.Array, mask, call: L.Call, **shared):
    """What `layers.run` returns: (B, T, D), states (embedding, then every layer; only with call.hidden), taps."""
    first, states, taps = 0, [x], call.keep({"embedding": x}, mask)
    for names, graphdef, stacked in _runs(layers):
        wanted = frozenset(t.removeprefix(n) for n in names for t in call.taps if _of(t, n))
        inner = call._replace(taps=wanted).fold(SITE)

        def body(x, at, graphdef=graphdef, inner=inner, first=first):
            i, params = at
            layer = functools.partial(nnx.merge(graphdef, params), mask=mask, call=inner.fold(first + i),
                                      **shared)
            x, new = L.remat(layer, call)(x)
            return x, (x if call.hidden else None, new)

        with jax.named_scope(f"{names[0]} to {names[-1]}"):
            if len(names) == 1:
                x, (state, new) = body(x, (0, jax.tree.map(lambda p: p[0], stacked)))
                state, new = jax.tree.map(lambda y: y[None], (state, new))
            else:
                x, (state, new) = jax.lax.scan(body, x, (jnp.arange(len(names)), stacked))
        first += len(names)
        states += [] if state is None else list(state)
        taps |= {f"{n}{t}": y[j] for j, n in enumerate(names) for t, y in new.items() if f"{n}{t}" in call.taps}
    return x, states, taps


def _of(tap: str, name: str) -> bool:
    return tap == name or tap.startswith(name + ".")


def _runs(layers) -> list[tuple[list[str], Any, Any]]:
    """Runs of equal neighbours: (names, their common graph definition, parameters with a leading layer axis)."""
    runs: list[tuple[list[str], Any, list]] = []
    for layer in layers:
        name, index = layer.name, layer.index
        layer.name, layer.index = "", 0                      # all that may differ between equal layers
        graphdef, params = nnx.split(layer)
        layer.name, layer.index = name, index
        like = runs and runs[-1][1] == graphdef and _shapes(runs[-1][2][-1]) == _shapes(params)
        if like:
            runs[-1][0].append(name)
            runs[-1][2].append(params)
        else:
            runs.append(([name], graphdef, [params]))
    return [(names, graphdef, jax.tree.map(lambda *p: jnp.stack(p), *params)) for names, graphdef, params in runs]


def _shapes(params):
    return jax.tree.structure(params), [(x.shape, x.dtype) for x in jax.tree.leaves(params)]
