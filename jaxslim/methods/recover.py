"""Recovery of cut blocks: each block alone learns the output of the block it comes from, all of them in one step; and
LoRA on the factors."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim import adapters
from jaxslim.models import bind, layers
from jaxslim.models.roles import prefix, roles
from jaxslim.slim import Outputs, Slim, Term, inputs
from jaxslim.spec import LINEARS, Spec, kind
from jaxslim.train import losses

PARTS = tuple(LINEARS)   # kinds of blocks that have linears to cut


def layerwise(student: Slim, targets: dict[str, jax.Array]) -> dict[str, Term]:
    """Squared error of every changed block over the energy of the teacher's output. `targets`: the taps `<block>.in`
    and `.out` of the teacher (zero where padded), and `memory`, the encoder's output, where there is a decoder."""
    spec, module = student.spec, bind.bind(student.spec, student.params)
    blocks = [b for b in spec.blocks if kind(b) in PARTS]
    terms = {}
    for block in blocks:
        x, want = targets[f"{block}.in"], targets[f"{block}.out"].astype(jnp.float32)
        mask = (x != 0).any(-1)                                                              # (B, T)
        got = run(module, spec, block, x, mask, targets.get("memory")).astype(jnp.float32)
        sums = (layers.zero_padding(v, mask).sum() for v in (((got - want) ** 2).mean(-1), (want**2).mean(-1)))
        terms[block] = Term(*sums, 1.0 / len(blocks))
    return terms


def run(module, spec: Spec, block: str, x: jax.Array, mask, memory=None) -> jax.Array:
    """Output of one block of a bound module for x (B, T, D); mask (B, T) or None."""
    call, owner, side = layers.Call(), roles(spec, block)["owner"], block.split(".")[0]
    layer = bind.submodule(module, roles(spec, block.rpartition(".")[0])["owner"])
    if kind(block) in ("ffn", "ffn1", "ffn2"):
        if spec.family == "whisper":
            return layer.ffn(x, call)
        return layer.feed_forward(x) if hasattr(layer, "up") else bind.submodule(module, owner)(x, call)
    attention = bind.submodule(module, owner)
    if kind(block) == "cross":
        return attention.attend(x, *attention.keys(memory), None, call)
    if side == "decoder":
        lower = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))[None]
        return attention.attend(x, *attention.keys(x), lower if mask is None else lower & mask[:, None], call)
    return attention(x, mask, call, *shared(module, spec, x.shape[1]))


def shared(module, spec: Spec, length: int) -> tuple:
    """What an encoder holds for the attention of all layers: WavLM's bias, rotary rates."""
    encoder = getattr(bind.submodule(module, prefix(spec).rstrip(".")), "encoder", None)
    if getattr(encoder, "biased", False):
        return (encoder.layers[0].attention.shared(length),)
    if getattr(encoder, "rotary", False):
        return (encoder.embed_positions() if encoder.final else jnp.array(encoder.rates, jnp.float32),)
    return ()


def add_lora(model: Slim, rank: int, alpha: float, key) -> Slim:
    """LoRA (arXiv 2106.09685) on every whole linear of the cut blocks. Matrices that are factors up x down already have
    none: it would raise their rank."""
    placement = {}
    for block, fields in model.spec.blocks.items():
        if kind(block) in PARTS:
            names = roles(model.spec, block)
            lora = {role: {"rank": rank, "alpha": alpha} for role in LINEARS[kind(block)]
                    if f"{names[role]}.weight" in model.params and f"{role}_rank" not in fields}
            placement |= {block: {"lora": lora}} if lora else {}
    return adapters.insert(model, placement, key)


def logit_kl(out: Outputs, wanted: jax.Array, batch, temperature: float = 1.0) -> Term:
    """KL of the outputs to a teacher's logits, (B, T, V) or one label a row (B, V)."""
    two = [x[:, None] if x.ndim == 2 else x for x in (out.logits, wanted)]
    return losses.kl(*two, valid(out, batch), temperature)


def valid(out: Outputs, batch) -> jax.Array:
    """(B, T) True on the frames (or tokens) whose logits count; (B, 1) for one result a clip."""
    values = out.logits if out.logits is not None else out.last_hidden_state
    if values.ndim == 2:
        return jnp.ones((values.shape[0], 1), bool)
    if "decoder_input_ids" in batch:
        given = batch.get("decoder_attention_mask")
        return jnp.ones(values.shape[:2], bool) if given is None else given != 0
    return layers.frame_mask(out.lengths, values.shape[1]) if out.lengths is not None else jnp.ones(values.shape[:2],
                                                                                                     bool)


def gap(a: Slim, b: Slim, batch, dtype: str | None = None) -> float:
    """Largest difference of the outputs of two models on one batch, on valid frames; matrix products in `dtype`."""
    outs = [model(dtype=dtype, **inputs(batch)) for model in (a, b)]
    x, y = (np.asarray(o.last_hidden_state if o.logits is None else o.logits, np.float32) for o in outs)
    mask = np.asarray(valid(outs[0], batch))
    return float(np.abs(x - y)[mask if x.ndim == 3 else ...].max(initial=0.0))
