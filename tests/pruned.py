"""Small models of every family that is pruned, with gates, and random masks on them. For test_gates, test_prune."""
from __future__ import annotations

import functools

import jax
import numpy as np
import tiny
import tiny_whisper

from jaxslim.models import gates, positions, roles
from jaxslim.slim import Slim
from jaxslim.spec import GATES, Spec, kind

WIDTHS = (0, 1, 3, 8, None)  # units a block keeps; None = all
STABLE = dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
FAST = dict(conv_dim=[12, 12], conv_kernel=[10, 4], conv_stride=[5, 4], num_feat_extract_layers=2, mask_time_prob=0.0,
            num_conv_pos_embeddings=4)
CONFORMER = dict(FAST, position_embeddings_type="relative", conv_depthwise_kernel_size=5, hidden_act="swish",
                 conformer_conv_dropout=0.0)
BERT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=50,
            max_position_embeddings=40, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
FAMILIES = {  # name: (family, head, changes of the config)
    "wav2vec2": ("wav2vec2", "ctc", FAST),
    "wav2vec2-stable": ("wav2vec2", "ctc", dict(FAST, **STABLE)),
    "hubert": ("hubert", "none", dict(FAST, feat_proj_layer_norm=False, conv_pos_batch_norm=True)),
    "wavlm": ("wavlm", "ctc", dict(FAST, **STABLE, num_buckets=20, max_bucket_distance=30)),
    "conformer": ("wav2vec2-conformer", "ctc", CONFORMER),
    "w2v-bert": ("wav2vec2-bert", "ctc", dict(
        CONFORMER, feature_projection_input_dim=20, left_max_position_embeddings=6, right_max_position_embeddings=3,
        position_embeddings_type="relative_key")),
    "whisper": ("whisper", "seq2seq", {}),
    "bert": ("bert", "classification", BERT),
    "roberta": ("roberta", "classification", dict(BERT, pad_token_id=1)),
}


@functools.cache
def model(name: str) -> Slim:
    """A random model, no gates."""
    from transformers import CONFIG_MAPPING

    family, head, changes = FAMILIES[name]
    if family == "whisper":
        config = tiny_whisper.config(16, num_mel_bins=8)
    else:
        config = CONFIG_MAPPING[family](**changes).to_dict() if family in ("bert", "roberta") else tiny.config(
            family, **changes)
    return tiny.slim(Spec(config, family, head))


def inputs(spec: Spec) -> dict[str, np.ndarray]:
    if spec.family == "whisper":
        return {"input_features": tiny_whisper.features(2, 8, 16), "decoder_input_ids": tiny_whisper.ids()}
    if spec.family in ("bert", "roberta"):
        mask = (np.arange(17) < np.array([17, 9])[:, None]).astype(np.int32)
        ids = np.random.default_rng(7).integers(5, 50, mask.shape)
        return {"input_ids": np.where(mask == 1, ids, spec["pad_token_id"]).astype(np.int32), "attention_mask": mask}
    values, mask = tiny.waves(1200, 700)
    if spec.family == "wav2vec2-bert":
        mask = (np.arange(40) < np.array([40, 23])[:, None]).astype(np.int32)
        values = values[:, :800].reshape(2, 40, 20)
        return {"input_features": values * mask[..., None], "attention_mask": mask}
    return {"input_values": values, "attention_mask": mask}


NO_RANKS = {what: tuple(unit for unit in units if unit not in gates.DIMS) for what, units in GATES.items()}


def with_gates(model: Slim, gates_of=GATES, seed: int = 0, spread: float = 3.0, **options) -> Slim:
    """The model with every gate its blocks can have, at random."""
    spec = model.spec
    for block in roles.blocks(spec):
        if kind(block) in GATES and not (spec.family == "whisper" and block == "frontend.1"):
            spec = spec.with_block(block, gates={what: dict(options) for what in gates_of[kind(block)]
                                                 if what not in gates.DIMS or ranked(spec, block, what)})
    rng = np.random.default_rng(seed)
    return Slim(spec, {**model.params, **{name: (spread * rng.standard_normal(x.shape)).astype(np.float32)
                                          for name, x in gates.shapes(spec).items()}})


def ranked(spec: Spec, block: str, what: str) -> bool:
    """Whether gates on these ranks are defined."""
    a = spec.attention(block)
    relative = kind(block) == "attention" and positions.kind(spec) == "relative_key"
    return bool(a.count) and (what == "vo" or a.mixer == "softmax" and not relative)


def widths(spec: Spec, seed: int) -> dict[str, int]:
    """How many units each block keeps: none (seed 0), one (seed 1), or drawn from WIDTHS."""
    rng, found = np.random.default_rng(seed), {}
    for g in gates.groups(spec):
        width = seed if seed < 2 else WIDTHS[rng.integers(len(WIDTHS))]
        found[g.key] = min(max(g.size if width is None else width, gates.least(g.key)), g.size)
    return found


def mask(spec: Spec, keep: dict[str, int], seed: int) -> dict[str, gates.Gate]:
    """Random units of each block, with values between 0.3 and 1."""
    rng, state = np.random.default_rng(seed), {}
    for g in gates.groups(spec):
        on = np.zeros(g.size, np.float32)
        on[rng.permutation(g.size)[: keep[g.key]]] = 1.0
        state[g.key] = gates.Gate(on * rng.uniform(0.3, 1.0, g.size).astype(np.float32), on)
    return state


QUICK = {"xla_backend_optimization_level": "0"}  # halves the time to compile


@functools.partial(jax.jit, static_argnames="spec", compiler_options=QUICK)
def run_masked(spec: Spec, params, state, batch):
    from jaxslim.models import bind, layers

    return output(bind.bind(spec, gates.fold(spec, params, state))(layers.Call(), **batch))


@functools.partial(jax.jit, static_argnames="spec", compiler_options=QUICK)
def run(spec: Spec, params, batch):
    return output(Slim(spec, params)(**batch))


def output(out):
    return out.last_hidden_state if out.logits is None else out.logits


def difference(name: str, masks: int, profiles: int) -> list[float]:
    """Max |masked - cut| over max(1, max |cut|) for `masks` random masks that share `profiles` shapes."""
    gated = with_gates(model(name))
    batch, found = inputs(gated.spec), []
    for i in range(masks):
        state = mask(gated.spec, widths(gated.spec, i % profiles), i)
        want = np.asarray(run(*gates.cut(gated.spec, gated.params, state), batch), np.float64)
        have = np.asarray(run_masked(gated.spec, gated.params, state, batch), np.float64)
        assert np.isfinite(want).all() and have.shape == want.shape
        found.append(float(np.abs(have - want).max() / max(1.0, np.abs(want).max())))
    return found


if __name__ == "__main__":  # python tests/pruned.py MASKS PROFILES: the long version, as JSON
    import json
    import sys

    count, shapes = map(int, sys.argv[1:3])
    print(json.dumps([{"family": name, "masks": count, "shapes": shapes,
                       "max_relative_difference": max(difference(name, count, shapes))} for name in FAMILIES]))
