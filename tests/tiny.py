"""Small random models, built in process: with PyTorch (the reference) or without. Shared by the tests."""
from __future__ import annotations

import contextlib
import os
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxslim.models import bind
from jaxslim.slim import Slim
from jaxslim.spec import Spec

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=[12, 16, 20],
             conv_kernel=[10, 3, 2], conv_stride=[5, 4, 2], num_feat_extract_layers=3, num_conv_pos_embeddings=16,
             num_conv_pos_embedding_groups=4, vocab_size=11, pad_token_id=0, bos_token_id=1, eos_token_id=2,
             mask_time_prob=0.05, layer_norm_eps=1e-5, hidden_dropout=0.0, attention_dropout=0.0,
             activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0)
STRIDE = 40  # samples a frame of SMALL


def config(family: str = "wav2vec2", **changes: Any) -> dict[str, Any]:
    """config.json of a small model, as transformers writes it."""
    from transformers import CONFIG_MAPPING

    changes = {**SMALL, **changes}
    if family in ("parakeet_ctc", "parakeet_encoder"):
        return parakeet(family, changes)
    return CONFIG_MAPPING[family](**changes).to_dict()


def parakeet(family: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The encoder's keys of `changes` in a section of their own, for the model with a head."""
    from transformers import ParakeetCTCConfig, ParakeetEncoderConfig

    encoder = {"dropout": 0.0, "num_mel_bins": 80, "subsampling_conv_channels": 6, "conv_kernel_size": 5,
               **{k: v for k, v in changes.items() if hasattr(ParakeetEncoderConfig, k)}}
    if family == "parakeet_encoder":
        return ParakeetEncoderConfig(**encoder).to_dict()
    return ParakeetCTCConfig(encoder_config=encoder, vocab_size=changes["vocab_size"], pad_token_id=0).to_dict()


def torch_model(config: dict[str, Any], head: str = "ctc", seed: int = 0):
    """The transformers model of a config with every parameter and buffer random, norms and statistics included."""
    import torch
    import transformers

    from jaxslim import hub

    cls = getattr(transformers, hub._architecture(config["model_type"], head))
    model = cls(transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)).eval()
    generator, stored = torch.Generator().manual_seed(seed), set(model.state_dict())
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if not p.is_floating_point() or name not in stored:           # a table that no checkpoint holds
                continue
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith(("running_var", "original0")):           # a variance, a weight norm's magnitude
                p.copy_(0.5 + noise.abs())
            elif p.ndim == 1:                                         # norms near 1, biases near 0
                p.copy_(0.3 * noise + (1.0 if name.endswith("norm.weight") else 0.0))
            else:
                p.copy_(1.2 * noise / p[0].numel() ** 0.5)
    return model


def slim(config: dict[str, Any] | Spec | None = None, head: str = "ctc", seed: int = 0, **changes: Any) -> Slim:
    """A random Slim of a config (or Spec), made without PyTorch."""
    spec = config if isinstance(config, Spec) else Spec(config or globals()["config"](**changes),
                                                        (config or {}).get("model_type", "wav2vec2"), head)
    rng, params = np.random.default_rng(seed), {}
    for name, want in bind.shapes(spec).items():
        noise = rng.standard_normal(want.shape).astype(np.float32)
        if not jnp.issubdtype(want.dtype, jnp.floating):
            noise = np.zeros(want.shape, want.dtype)
        elif name.endswith(("running_var", "original0")):
            noise = 0.5 + np.abs(noise)
        elif noise.ndim == 1:
            noise = 0.3 * noise + (1.0 if name.endswith("norm.weight") else 0.0)
        else:
            noise = 1.2 * noise / np.sqrt(noise[0].size)
        params[name] = jnp.asarray(noise, want.dtype)
    return Slim(spec, params)


def save(model, folder) -> str:
    """save_pretrained, quietly; returns the folder."""
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return str(folder)


def waves(*samples: int, seed: int = 0, fill: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A right-padded batch of random waveforms of these lengths and its attention mask; `fill` scales noise put
    where the padding is."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((len(samples), max(samples))).astype(np.float32)
    mask = (np.arange(max(samples)) < np.array(samples)[:, None]).astype(np.int32)
    garbage = np.random.default_rng(seed + 1).standard_normal(values.shape).astype(np.float32)
    return np.where(mask == 1, values, fill * garbage).astype(np.float32), mask


def close(have, want, tolerance: float = 1e-4) -> float:
    """Max difference over `max(1, max abs of the reference)`, which must be at most `tolerance`; returns it."""
    have, want = np.asarray(have, np.float64), np.asarray(want, np.float64)
    assert have.shape == want.shape, (have.shape, want.shape)
    ratio = float(np.abs(have - want).max() / max(1.0, np.abs(want).max()))
    assert ratio <= tolerance, f"max difference {ratio:.2e} of max(1, max abs of the reference)"
    return ratio
