"""What is measured of softmax attention before `linearize` replaces it."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim.models import bind, layers, roles
from jaxslim.slim import Slim
from jaxslim.train import losses


def leave_one_in(teacher: Slim, student_with, chosen, data) -> dict[int, dict[str, float]]:
    """Layer -> how far a student with only this layer's attention is from the teacher: {error, gmacs at 10 s}.

    Args: student_with(layer) -> Slim; data: batches of inputs. The error is the LN-MSE of the last hidden states.
    """
    from jaxslim import cost

    @jax.jit
    def distance(student, teacher, batch):
        s, t = student(**batch), teacher(**batch)
        mask = layers.valid_frames(t.lengths, t.last_hidden_state)
        return losses.hidden(s.last_hidden_state, t.last_hidden_state, mask)[:2]

    table = {}
    for i in chosen:
        student = student_with(i)
        total = np.sum([np.asarray(distance(student, teacher, batch)) for batch in data], 0)
        table[i] = {"error": float(total[0] / total[1]), "gmacs": cost.macs(student.spec, 10.0).total / 1e9}
    return table


def near_shares(teacher: Slim, blocks: list[str], window: int, causal: bool, data) -> dict[str, np.ndarray]:
    """Block -> the mean share (H,) of softmax attention on frames nearer than `window`, by content alone: attention
    with positions of its own is taken without them. data: batches of inputs."""

    def row(part):                                                                                   # of one clip
        q, k, mask = part                                                                            # (T, H, K)
        ahead = np.arange(len(q))[None] - np.arange(len(q))[:, None]
        scores = jnp.einsum("ihk,jhk->hij", q, k).astype(jnp.float32)
        weights = jax.nn.softmax(jnp.where(((ahead <= 0) | (not causal)) & mask, scores, -1e30), -1)
        return jnp.where(mask, jnp.where(np.abs(ahead) < window, weights, 0.0).sum(-1), 0.0).sum(-1)

    @jax.jit
    def measure(teacher, batch):
        out = teacher(taps=tuple(f"{b}.in" for b in blocks), **batch)
        module, found = bind.bind(teacher.spec, teacher.params), {}
        for block in blocks:
            attention, x = bind.submodule(module, roles.roles(teacher.spec, block)["owner"]), out.taps[f"{block}.in"]
            q = attention._split(getattr(attention, attention.names[0])(x)) * attention.scale        # (B, T, H, K)
            mask = layers.valid_frames(out.lengths, x)
            found[block] = jax.lax.map(row, (q, attention.keys(x)[0], mask)).sum(0), mask.sum()
        return found

    each = [jax.device_get(measure(teacher, batch)) for batch in data]
    return {b: sum(f[b][0] for f in each) / max(sum(f[b][1] for f in each), 1) for b in blocks}
