"""Losses as (sum, count) pairs in fp32, so that microbatches, hosts and padding never change a mean."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jaxslim.slim import Term

IGNORE = -100  # label padding, as in transformers


def ctc(logits: jax.Array, lengths: jax.Array, labels: jax.Array, blank: int) -> tuple[Term, jax.Array]:
    """CTC loss per label unit.

    Args: logits (B, T, V); lengths (B,) valid frames; labels (B, N), IGNORE beyond each text; blank id.
    Returns: the term (sum of -log p, number of labels) over rows whose labels fit their frames, and the number of
      rows that do not fit. Such rows weigh nothing: optax gives them about 1e5 with finite gradients.
    """
    valid = labels >= 0
    sizes = valid.sum(-1)
    repeats = ((labels[:, 1:] == labels[:, :-1]) & valid[:, 1:]).sum(-1)
    fits = (sizes + repeats <= lengths) & (sizes > 0)
    padding = (jnp.arange(logits.shape[1]) >= lengths[:, None]).astype(jnp.float32)
    losses = optax.ctc_loss(logits.astype(jnp.float32), padding, jnp.where(valid, labels, 0),
                            (~valid).astype(jnp.float32), blank_id=blank)
    losses = jnp.where(fits, jnp.maximum(losses, 0.0), 0.0)  # rounding can make a confident row slightly negative
    count = jnp.where(fits, sizes, 0).sum().astype(jnp.float32)
    return Term(losses.sum(), count), ((sizes > 0) & ~fits).sum()


def cross_entropy(logits: jax.Array, labels: jax.Array) -> Term:
    """Classification: sum over the labelled of -log p, count = how many are. logits (B, [T,] V), labels (B, [T]),
    IGNORE where there is none."""
    valid = labels >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), jnp.where(valid, labels, 0))
    return Term(jnp.where(valid, losses, 0.0).sum(), valid.sum().astype(jnp.float32))


DISTANCES = ("mse", "ln_mse", "channel_mse", "cosine", "l1", "l1_cosine", "log_sigmoid", "l1_log_sigmoid")


def hidden(student: jax.Array, teacher: jax.Array, mask: jax.Array, distance: str = "ln_mse") -> Term:
    """Distance of hidden states (B, T, D) over valid frames of mask (B, T): sum over frames, count = frames.

    `mse`, `l1`: mean over channels; `ln_mse`: the same after affine-free LayerNorm of both (CALD's speech setting);
    `channel_mse` (ours): each channel relative to the teacher's variance in it over the batch, for states of which a
    few channels are far larger than all others (Whisper's), where `ln_mse` sees nothing else;
    `cosine`: 1 - cosine similarity; `log_sigmoid`: minus its log-sigmoid. `l1_cosine` (DPHuBERT) and
    `l1_log_sigmoid` (DistilHuBERT, arXiv 2110.01900, section 2.2, with lambda = 1) are sums of two.
    """
    if distance not in DISTANCES:
        raise ValueError(f"distance {distance!r}: use {', '.join(DISTANCES[:-1])} or {DISTANCES[-1]}.")
    s, t = student.astype(jnp.float32), jax.lax.stop_gradient(teacher.astype(jnp.float32))
    if distance == "ln_mse":
        s, t = standardize(s), standardize(t)
    if distance == "channel_mse":
        frames = jnp.maximum(mask.sum(), 1)
        mean = jnp.where(mask[..., None], t, 0.0).sum((0, 1)) / frames
        variance = jnp.where(mask[..., None], (t - mean) ** 2, 0.0).sum((0, 1)) / frames             # (D,)
        scale = jax.lax.rsqrt(variance + 1e-2 * variance.mean() + 1e-12)
        s, t = s * scale, t * scale
    d = 0.0
    if distance.endswith("mse"):
        d = ((s - t) ** 2).mean(-1)
    if distance.startswith("l1"):
        d = jnp.abs(s - t).mean(-1)
    if not distance.endswith(("mse", "l1")):
        cosine = (s * t).sum(-1) * jax.lax.rsqrt((s * s).sum(-1) * (t * t).sum(-1) + 1e-12)
        d = d + (1.0 - cosine if distance.endswith("cosine") else -jax.nn.log_sigmoid(cosine))
    return Term(jnp.where(mask, d, 0.0).sum(), mask.sum().astype(jnp.float32))


def gram(student: jax.Array, teacher: jax.Array, mask: jax.Array) -> Term:
    """Squared difference of temporal Gram matrices x_t . x_s / D (STaR, arXiv 2312.09040), over all pairs of valid
    frames of a row: (B, T, D) and (B, T, D'), whose widths may differ; count = pairs. The 1 / D is ours."""
    s, t = (_gram(jnp.where(mask[..., None], x.astype(jnp.float32), 0.0)) / x.shape[-1]
            for x in (student, jax.lax.stop_gradient(teacher)))
    return Term(((s - t) ** 2).sum(), (mask.sum(-1).astype(jnp.float32) ** 2).sum())


def cka(student: jax.Array, teacher: jax.Array, mask: jax.Array) -> Term:
    """1 - linear CKA (Kornblith et al., arXiv 1905.00414, section 3) of each row's valid frames: (B, T, D) and
    (B, T, D'), whose widths may differ; sum over rows, count = rows with two valid frames or more."""
    frames = mask.sum(-1).astype(jnp.float32)                                                        # (B,)

    def centred(x):
        x = jnp.where(mask[..., None], x.astype(jnp.float32), 0.0)
        mean = x.sum(1, keepdims=True) / jnp.maximum(frames, 1.0)[:, None, None]
        return _gram(jnp.where(mask[..., None], x - mean, 0.0))

    s, t = centred(student), jax.lax.stop_gradient(centred(teacher))                                 # (B, T, T)
    dot = lambda a, b: (a * b).sum((1, 2))  # noqa: E731
    alike = dot(s, t) * jax.lax.rsqrt(dot(s, s) * dot(t, t) + 1e-12)
    return Term(jnp.where(frames > 1, 1.0 - alike, 0.0).sum(), (frames > 1).sum().astype(jnp.float32))


def _gram(x: jax.Array) -> jax.Array:
    return jnp.einsum("btd,bsd->bts", x, x)


def standardize(x: jax.Array, eps: float = 1e-5) -> jax.Array:
    """LayerNorm without weights over the last axis."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)


def kl(student: jax.Array, teacher: jax.Array, mask: jax.Array, temperature: float = 1.0) -> Term:
    """KL(teacher || student) of logits (B, T, V) at a temperature, over valid frames; times temperature squared."""
    t = jax.nn.log_softmax(jax.lax.stop_gradient(teacher.astype(jnp.float32)) / temperature, -1)
    s = jax.nn.log_softmax(student.astype(jnp.float32) / temperature, -1)
    d = (jnp.exp(t) * (t - s)).sum(-1) * temperature**2
    return Term(jnp.where(mask, d, 0.0).sum(), mask.sum().astype(jnp.float32))
