"""A model beside the PyTorch model of transformers, layer by layer."""
from __future__ import annotations

import os
from typing import Any

import numpy as np

from jaxslim import formulas
from jaxslim.architectures import architecture
from jaxslim.models.roles import prefix
from jaxslim.slim import Slim
from jaxslim.spec import Spec
from jaxslim.weights import HubError


def compare(model: Slim, reference: str | os.PathLike, seconds: float = 1.0, tolerance: float = 1e-4):
    """Layer by layer against the PyTorch model in the folder `reference`, on a fixed random input (`probe`), in fp32.

    Returns:
      Rows (tap, max abs difference, max abs of the reference, within `tolerance * max(1, that maximum)`).
    """
    if model.spec.blocks:
        raise HubError(f"{reference}: blocks {', '.join(list(model.spec.blocks)[:4])} differ from the config, which "
                       "transformers cannot open; only a stock model can be compared with it.")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise HubError("The comparison needs PyTorch: pip install 'jaxslim[test]' (torch, CPU is enough).") from error

    torch_model = getattr(transformers, architecture(model.spec.family, model.spec.head)).from_pretrained(
        reference, dtype=torch.float32).eval()
    inputs = probe(model.spec, seconds)
    encoder = torch_model.get_submodule(prefix(model.spec).rstrip("."))  # "" is the model itself
    want = {}
    parts = [("frontend", "feature_extractor"), ("projection", "feature_projection"), ("projection", "subsampling")]
    parts = {tap: getattr(encoder, part) for tap, part in parts if hasattr(encoder, part)}
    for tap, module in parts.items():
        module.register_forward_hook(lambda _, __, out, tap=tap: want.__setitem__(tap, out))
    with torch.no_grad():
        out = torch_model(**{k: torch.from_numpy(v) for k, v in inputs.items()}, output_hidden_states=True)
    want = {k: v[0] if isinstance(v, tuple) else v for k, v in want.items()}  # HuBERT: a tensor, wav2vec2: two
    if "frontend" in want:
        want["frontend"] = want["frontend"].transpose(1, 2)
    last = "last_hidden_state" if model.spec.head == "none" else "logits"
    want |= _states(out) | {last: getattr(out, last)}
    have = model(**inputs, output_hidden_states=True, taps=tuple(parts), dtype="float32")
    got = {**(have.taps or {}), **_states(have), last: getattr(have, last)}
    rows = []
    for tap, value in want.items():
        value = value.numpy()
        difference, scale = float(np.abs(np.asarray(got[tap]) - value).max()), float(np.abs(value).max())
        rows.append((tap, difference, scale, difference <= tolerance * max(1.0, scale)))
    return rows


def probe(spec: Spec, seconds: float) -> dict[str, np.ndarray]:
    """A fixed random waveform, features or tokens (then at least 16), batch 1."""
    rng, seconds = np.random.default_rng(0), max(seconds, 16 / formulas.TOKEN_RATE * (spec.family in formulas.TEXT))
    return {k: rng.standard_normal(x.shape, np.float32) if np.issubdtype(x.dtype, np.floating) else
            rng.integers(min(5, spec["vocab_size"] - 1), spec["vocab_size"], x.shape)
            for k, x in formulas.inputs(spec, seconds, 1).items()}


def _states(out) -> dict[str, Any]:
    """Name -> hidden state of an output, ours or transformers': encoder, then decoder if there is one."""
    encoder = getattr(out, "encoder_hidden_states", None)
    if encoder is None:
        return _named("encoder", out.hidden_states)
    decoder = _named("decoder", getattr(out, "decoder_hidden_states", None) or out.hidden_states)
    return _named("encoder", encoder) | {"decoder.embedding": decoder.pop("embedding")} | decoder


def _named(side: str, states) -> dict[str, Any]:
    return dict(zip(["embedding", *(f"{side}.{i}" for i in range(len(states) - 1))], states, strict=True))
