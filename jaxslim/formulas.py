"""Multiply-accumulates of each family by formula, block by block; cost.py adds them up and checks them by counting."""
from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxslim.models import adapters, conformer, gemma3n, heads, mixers, parakeet, positions, recurrent
from jaxslim.models.roles import FAMILIES, blocks
from jaxslim.spec import Spec, kind

SAMPLING_RATE = 16000  # of every model of this release
TEXT, TOKEN_RATE = ("bert", "roberta", "distilbert", "gpt_neox"), 4  # text has no seconds: about 4 tokens when read
FEATURES = {"wav2vec2-bert": "feature_projection_input_dim", "parakeet_ctc": "num_mel_bins",
            "parakeet_encoder": "num_mel_bins"}  # families that read features, and the config key of their number
LATE = {"intermediate": "use_intermediate_ffn_before_adapter", "adapter": "add_adapter"}  # behind the layers -> switch


def inputs(spec: Spec, seconds: float, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What a model is called with for `batch` clips of `seconds` s."""
    if spec.family in TEXT:
        return {"input_ids": jax.ShapeDtypeStruct((batch, lengths(spec, seconds)[0]), jnp.int32)}
    if spec.family == "gemma3n_audio":
        shape = (batch, _feature_frames(spec, _samples(seconds)), spec["input_feat_size"])
        return {"audio_mel": jax.ShapeDtypeStruct(shape, jnp.float32)}
    if spec.family in FEATURES:
        shape = (batch, lengths(spec, seconds)[0], spec[FEATURES[spec.family]])
        return {"input_features": jax.ShapeDtypeStruct(shape, jnp.float32)}
    if spec.family == "whisper":
        frames, _, tokens, windows = lengths(spec, seconds)
        shapes = (batch * windows, spec["num_mel_bins"], frames), (batch * windows, tokens)
        return {"input_features": jax.ShapeDtypeStruct(shapes[0], jnp.float32),
                "decoder_input_ids": jax.ShapeDtypeStruct(shapes[1], jnp.int32)}
    return {"input_values": jax.ShapeDtypeStruct((batch, _samples(seconds)), jnp.float32)}


def parts(spec: Spec) -> list[str]:
    """Blocks and the parts that are none, front to back."""
    ids = blocks(spec)
    front, head = ([b for b in ids if kind(b) == what] for what in ("frontend", "head"))
    rest = [part for part in FAMILIES[spec.family].rest if part not in LATE or spec.get(LATE[part])]
    early, late = ([part for part in rest if (part in LATE) == last] for last in (False, True))
    return [*front, *early, *ids[len(front) : len(ids) - len(head)], *late, *head]


def _tokens(seconds: float) -> int:
    return max(1, round(seconds * TOKEN_RATE))


def _samples(seconds: float) -> int:
    return round(seconds * SAMPLING_RATE)


def _feature_frames(spec: Spec, samples: int) -> int:
    """Frames of `input_features` for a number of samples at 16 kHz, as the families' extractors make them."""
    if "parakeet" in spec.family:
        return samples // 160 + 1                                        # centred windows
    if spec.family == "gemma3n_audio":
        return max((samples - 513) // 160 + 1, 0)                        # windows of 512 samples and one more
    return max((samples - 400) // 160 + 2, 0) // 2                       # whole windows, stacked by two


def lengths(spec: Spec, seconds: float) -> list[int]:
    """Frames after each front-end convolution. Raises ValueError when none is left."""
    if spec.family in TEXT:
        if spec.family == "gpt_neox":
            return [_tokens(seconds)]                                    # rotary positions have no last one
        used = spec["pad_token_id"] + 1 if spec.family == "roberta" else 0  # RoBERTa's positions start behind padding
        return [min(_tokens(seconds), spec["max_position_embeddings"] - used)]  # longer texts are cut
    if spec.family == "gemma3n_audio":
        if (count := _feature_frames(spec, _samples(seconds))) < 1:
            raise ValueError(f"{seconds:g} s of audio is shorter than one frame of this model.")
        return gemma3n.frames(spec, count)
    if spec.family in FEATURES:
        counts = [_feature_frames(spec, _samples(seconds))]
        counts += parakeet.subsampled(spec, counts[0]) if "parakeet" in spec.family else []
        if counts[-1] < 1:
            raise ValueError(f"{seconds:g} s of audio is shorter than one frame of this model.")
        return counts
    if spec.family == "whisper":  # whole windows of audio whatever the length; about as many tokens as are said in one
        window = spec["max_source_positions"] / 50
        tokens = min(_tokens(min(seconds, window)), spec["max_target_positions"])
        frames = spec["max_source_positions"]
        return [2 * frames, frames, tokens, max(1, -int(-seconds // window))]
    counts, n = [], _samples(seconds)
    for kernel, stride in zip(spec["conv_kernel"], spec["conv_stride"], strict=True):
        n = (n - kernel) // stride + 1
        if n < 1:
            raise ValueError(f"{seconds:g} s of audio is shorter than one frame of this model.")
        counts.append(n)
    return counts


def frames(spec: Spec, seconds: float) -> float:
    """Frames that a CTC model has for its labels (before adapters); other heads need none, so: infinitely many."""
    if spec.head != "ctc":
        return math.inf
    try:
        return lengths(spec, seconds)[-1]
    except ValueError:
        return 0


def attended(spec: Spec, seconds: float) -> int:
    """Frames that the encoder's attention sees at a time."""
    counts = lengths(spec, seconds)
    return counts[1] if spec.family == "whisper" else counts[-1]


def _front(spec: Spec, lengths: list[int]) -> Iterator[tuple[str, int]]:
    """Front end and projection of the families that read waveforms."""
    for i, n in enumerate(lengths):
        yield f"frontend.{i}", n * spec.channels(i) * spec.channels(i - 1) * spec["conv_kernel"][i]
    yield "projection", lengths[-1] * spec.channels(len(lengths) - 1) * spec["hidden_size"]


def _conformer(spec: Spec, lengths: list[int]) -> Iterator[tuple[str, int]]:
    """(block, MACs[, MACs whatever the batch]) of a wav2vec2-conformer, w2v-BERT or Parakeet for one clip."""
    width, T = spec["hidden_size"], lengths[-1]
    if spec.family == "wav2vec2-conformer":
        yield from _front(spec, lengths)
        yield "positional", 0  # in the checkpoint, read by nothing
    elif spec.family == "wav2vec2-bert":
        yield "projection", T * width * spec["feature_projection_input_dim"]
    else:
        yield "projection", _subsampling(spec, lengths)
    kernel = spec[conformer.STYLES[spec.family].kernel]
    for i in range(spec["num_hidden_layers"]):
        yield f"encoder.{i}.ffn1", _ffn(spec, f"encoder.{i}.ffn1", T)
        a, once = spec.attention(f"encoder.{i}.attention"), 0
        if positions.kind(spec) == "relative" and a.mixer == "softmax":  # embeddings of 2 T - 1 distances
            once = (2 * T - 1) * width * a.count * a.qk_dim
        yield f"encoder.{i}.attention", _attention(spec, f"encoder.{i}.attention", T), once
        yield f"encoder.{i}.conv", T * spec.conv(f"encoder.{i}.conv") * (3 * width + kernel)
        yield f"encoder.{i}.ffn2", _ffn(spec, f"encoder.{i}.ffn2", T)
    if spec.family == "wav2vec2-bert":
        T = yield from _bert_adapter(spec, T)
    elif spec.family == "wav2vec2-conformer":
        T = yield from _conv_adapter(spec, T)
    if spec.head != "none":
        yield "head", _head(spec, T)


def _gemma3n(spec: Spec, lengths: list[int]) -> Iterator[tuple[str, int]]:
    """(block, MACs[, MACs whatever the batch]) of Gemma 3n's audio encoder for one clip."""
    width, T, bins = spec["hidden_size"], lengths[-1], gemma3n.bins(spec)
    channels, kernels = [1, *spec["sscp_conv_channel_size"]], spec["sscp_conv_kernel_size"]
    yield "projection", T * bins[-1] * channels[-1] * width + sum(
        n * bins[i + 1] * channels[i] * channels[i + 1] * math.prod(kernels[i]) for i, n in enumerate(lengths))
    chunk, near = spec["conf_attention_chunk_size"], spec["conf_attention_context_right"] + 1
    near += max(0, spec["conf_attention_context_left"] - 1)              # frames that a query may see
    queries = -(-T // chunk) * chunk
    for i in range(spec["conf_num_hidden_layers"]):
        block, channels = f"encoder.{i}", spec.conv(f"encoder.{i}.conv")
        a = spec.attention(f"{block}.attention")
        yield f"{block}.ffn1", _ffn(spec, f"{block}.ffn1", T)
        yield (f"{block}.attention", T * (sum(_linear(width, width, a, r) for r in "qkvo")
                                          + _bottleneck(spec, f"{block}.attention", width))
               + queries * width * (2 * (chunk + near - 1) + near), near * width * width)
        yield f"{block}.conv", T * channels * (3 * width + spec["conf_conv_kernel_size"])
        yield f"{block}.ffn2", _ffn(spec, f"{block}.ffn2", T)


def _subsampling(spec: Spec, lengths: list[int]) -> int:
    channels, width = spec["subsampling_conv_channels"], spec["subsampling_conv_kernel_size"]
    mels = parakeet.subsampled(spec, spec["num_mel_bins"])
    total = sum(t * m * channels * (width**2 + (channels if i else 0))
                for i, (t, m) in enumerate(zip(lengths[1:], mels, strict=True)))
    return total + lengths[-1] * channels * mels[-1] * spec["hidden_size"]


def _bert_adapter(spec: Spec, T: int) -> Iterator[tuple[str, int]]:
    """w2v-BERT's extra feed-forward block and adapter; returns the frames they leave."""
    width, units = spec["hidden_size"], spec["intermediate_size"]
    if spec["use_intermediate_ffn_before_adapter"]:
        yield "intermediate", 2 * T * width * units
    if not spec["add_adapter"]:
        return T
    out, kernel, stride = heads.width(spec), spec["adapter_kernel_size"], spec["adapter_stride"]
    total = T * width * out if out != width else 0
    for _ in range(spec["num_adapter_layers"]):
        T = (T + 2 * (stride // 2) - kernel) // stride + 1
        total += T * out * (4 * kernel * out + 4 * out + 2 * T + 2 * units)
    yield "adapter", total
    return T


def _wav2vec2(spec: Spec, lengths: list[int]) -> Iterator[tuple[str, int]]:
    """(block, MACs) of a wav2vec2, HuBERT or WavLM model for one clip; `lengths` from `lengths`."""
    width, T = spec["hidden_size"], lengths[-1]
    yield from _front(spec, lengths)
    group = width // spec["num_conv_pos_embedding_groups"]
    yield "positional", T * width * group * spec["num_conv_pos_embeddings"]
    for i in range(spec["num_hidden_layers"]):
        yield f"encoder.{i}.attention", _attention(spec, f"encoder.{i}.attention", T)
        if spec["do_stable_layer_norm"] and (inner := spec.get("adapter_attn_dim")):
            yield f"encoder.{i}.ffn", T * 2 * width * inner
        yield f"encoder.{i}.ffn", _ffn(spec, f"encoder.{i}.ffn", T)
    if spec.generator:
        yield "generator", _generator(spec, T)
    T = yield from _conv_adapter(spec, T)
    if spec.head != "none":
        yield "head", _head(spec, T)


def _generator(spec: Spec, T: int) -> int:
    """MACs of a rollout. Keys of rows to come are there and masked, so each row pays for all of them."""
    g, width, rows = spec.generator, spec["hidden_size"], spec.generated
    layer = 4 * T * width**2 + 2 * T * T * width + _ffn(spec, "generator.0.ffn", T)
    if spec["do_stable_layer_norm"] and (inner := spec.get("adapter_attn_dim")):
        layer += T * 2 * width * inner
    if g.attention == "full":
        layer += 2 * (rows - 1) * T * T * width
    elif g.attention == "axial":
        layer += T * (4 * width**2 + 2 * rows * width)
    inject = 2 * width**2 if (g.attention, g.inject) == ("previous", "concat") else 0
    return rows * (g.layers * layer + T * (width**2 + inject))


def _ffn(spec: Spec, block: str, T: int) -> int:
    f, width = spec.ffn(block), spec.of(block, "hidden_size")
    return T * (_linear(width, f.units, f, "up") + _linear(f.units, width, f, "down") + _bottleneck(spec, block, width))


def _bottleneck(spec: Spec, block: str, width: int) -> int:
    """MACs a frame of a block's adapter, however many slots it has (ids by example); a merged one is units."""
    a = spec.adapter(block)
    return 0 if a is None or a.kind == "merged" else 2 * width * a.width


def _conv_adapter(spec: Spec, T: int) -> Iterator[tuple[str, int]]:
    """Conv adapters behind an encoder; returns the frames they leave."""
    if not spec.get("add_adapter"):
        return T
    width, kernel, stride = heads.width(spec), spec["adapter_kernel_size"], spec["adapter_stride"]
    total = T * spec["hidden_size"] * width if width != spec["hidden_size"] else 0
    for _ in range(spec["num_adapter_layers"]):
        T = (T + 2 * adapters.PADDING - kernel) // stride + 1
        total += T * 2 * width * width * kernel
    yield "adapter", total
    return T


def _head(spec: Spec, T: int) -> int:
    width = heads.width(spec)
    if spec.head == "ctc":
        return T * width * spec["vocab_size"]
    if spec.head == "frames":
        return T * width * heads.labels(spec)
    if spec.head == "classification":
        return spec["classifier_proj_size"] * (T * width + heads.labels(spec))
    dims, size = spec["tdnn_dim"], spec["xvector_output_dim"]
    total = T * width * dims[0] + 2 * dims[-1] * size + size * size
    for din, dout, kernel, dilation in zip([dims[0], *dims], dims, spec["tdnn_kernel"], spec["tdnn_dilation"]):
        T -= dilation * (kernel - 1)
        total += T * din * dout * kernel
    return total


def _attention(spec: Spec, block: str, T: int) -> int:
    a, width = spec.attention(block), spec.of(block, "hidden_size")
    count = a.count
    qk, v = count * a.qk_dim, count * a.v_dim
    if a.mixer in recurrent.KINDS:
        return T * _bottleneck(spec, block, width) + mixers.macs(a, width, T)
    projections = sum(_linear(*dims, a, role) for role, dims in
                      {"q": (width, qk), "k": (width, qk), "v": (width, v), "o": (v, width)}.items())
    projections += _bottleneck(spec, block, width)
    positional = _positions(spec, T, count, qk) if a.mixer == "softmax" else 0
    return T * (projections + positional) + mixers.macs(a, width, T)


def _positions(spec: Spec, T: int, count: int, qk: int) -> int:
    """MACs a frame that positions add to the softmax attention of `count` heads."""
    match positions.kind(spec):
        case "gated":
            return count * (spec["hidden_size"] // spec["num_attention_heads"]) * positions.GATES
        case "relative":
            return (2 * T - 1) * qk
        case "relative_key":
            return (spec["left_max_position_embeddings"] + spec["right_max_position_embeddings"] + 1) * qk
    return 0


def _linear(din: int, dout: int, block, role: str) -> int:
    """MACs a frame of the linear `role`; `block` is a resolved Attention or FFN. A block without heads or units keeps
    only a bias."""
    rank, lora = block.ranks.get(role), block.lora.get(role)
    factors = ((0 if rank is None else rank) + (lora["rank"] if lora else 0)) * (din + dout) * some(din) * some(dout)
    return factors + (din * dout if rank is None else 0)


def some(count):
    """1 where there is anything, else 0; between 0 and 1 for an expected count (budget.py)."""
    return int(bool(count)) if isinstance(count, int) else jnp.minimum(count, 1.0)


def _bert(spec: Spec, lengths: list[int]) -> Iterator[tuple[str, int]]:
    """(block, MACs) of a BERT, RoBERTa or DistilBERT model for one text of `lengths[-1]` tokens."""
    T, width = lengths[-1], spec.of("encoder", "hidden_size")
    pooled = spec.get("add_pooling_layer", True) if spec.head == "none" else spec.family == "bert"
    yield "embedding", 0
    if "pooler" in parts(spec):
        yield "pooler", width * width if pooled else 0
    for i in range(spec.of("encoder", "num_hidden_layers")):
        yield f"encoder.{i}.attention", _attention(spec, f"encoder.{i}.attention", T)
        yield f"encoder.{i}.ffn", _ffn(spec, f"encoder.{i}.ffn", T)
    if spec.head != "none":
        yield "head", width * (heads.labels(spec) + (0 if spec.family == "bert" else width))


def _gpt_neox(spec: Spec, lengths: list[int]) -> Iterator[tuple[str, int]]:
    """(block, MACs) of a GPT-NeoX model for one text; without a cache, later keys computed and masked."""
    T, width = lengths[-1], spec["hidden_size"]
    yield "embedding", 0
    for i in range(spec["num_hidden_layers"]):
        yield f"encoder.{i}.attention", _attention(spec, f"encoder.{i}.attention", T)
        yield f"encoder.{i}.ffn", _ffn(spec, f"encoder.{i}.ffn", T)
    if spec.head != "none":
        yield "head", T * width * spec["vocab_size"]


def _whisper(spec: Spec, lengths: list[int]) -> Iterator[tuple[str, int]]:
    """(block, MACs) of encoder and decoder over all windows of one clip; the decoder in one pass, without a cache."""
    frames, S, T, windows = lengths
    width = spec["d_model"]
    yield "frontend.0", windows * frames * spec.channels(0) * spec.channels(-1) * 3
    yield "frontend.1", windows * S * width * spec.channels(0) * 3
    yield "positional", 0
    for side, n in (("encoder", S), ("decoder", T)):
        for i in range(spec[f"{side}_layers"]):
            yield f"{side}.{i}.attention", windows * _attention(spec, f"{side}.{i}.attention", n)
            if side == "decoder":
                a = spec.attention(f"{side}.{i}.cross")
                qk, v = a.count * a.qk_dim, a.count * a.v_dim
                yield f"{side}.{i}.cross", windows * (
                    T * (_linear(width, qk, a, "q") + _linear(v, width, a, "o")) + T * S * (qk + v)
                    + T * _bottleneck(spec, f"{side}.{i}.cross", width)
                    + S * (_linear(width, qk, a, "k") + _linear(width, v, a, "v")))
            yield f"{side}.{i}.ffn", windows * _ffn(spec, f"{side}.{i}.ffn", n)
    if spec.head != "none":
        yield "head", windows * T * width * spec["vocab_size"]


FORMULAS = {"whisper": _whisper, "gemma3n_audio": _gemma3n, "gpt_neox": _gpt_neox,
            "wav2vec2": _wav2vec2, "hubert": _wav2vec2, "wavlm": _wav2vec2,
            **dict.fromkeys(("wav2vec2-conformer", "wav2vec2-bert", "parakeet_ctc", "parakeet_encoder"), _conformer),
            **dict.fromkeys(("bert", "roberta", "distilbert"), _bert)}
