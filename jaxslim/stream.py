"""Long audio a chunk of frames at a time, in memory that does not grow with its length.

* `Causal`: every mixer looks back only. Front end, positional convolution and mixers carry what they need of the past,
  so the result is that of one pass over everything. The positional convolution alone looks ahead, by `delay` frames.
* `Windows`: any model. Each chunk is run with `context` before and behind it; what lies farther away is not seen. A
  clip that fits into one window is one pass.

Both give the most probable symbol of every frame and run one compiled program of one shape.
"""
from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim.models import bind, layers, roles
from jaxslim.slim import Slim
from jaxslim.spec import SpecError

FAMILIES = ("wav2vec2", "hubert")


def geometry(spec) -> tuple[int, int]:
    """Samples from frame to frame, and samples that one frame sees."""
    stride, field = 1, 1
    for width, step in zip(reversed(spec["conv_kernel"]), reversed(spec["conv_stride"])):
        field, stride = (field - 1) * step + width, stride * step
    return stride, field


def samples_per_frame(spec, samples: int, frames: int) -> float:
    """Of a clip; exact for a convolutional front end, the mean for one on features."""
    return geometry(spec)[0] if spec.get("conv_kernel") else samples / frames


def is_causal(spec) -> bool:
    """Whether `Causal` takes a model of this Spec."""
    try:
        _check(spec)
    except SpecError:
        return False
    return True


def _check(spec) -> None:
    if spec.family not in FAMILIES or spec.head != "ctc" or spec.get("add_adapter"):
        raise SpecError(f"Streaming takes the families {', '.join(FAMILIES)} with a CTC head and no adapter behind the "
                        f"encoder, not {spec.family} with head {spec.head}.")
    if spec["feat_extract_norm"] != "layer" or spec.get("conv_pos_batch_norm"):
        raise SpecError("This model's front end normalises over the whole clip (feat_extract_norm group, or a batch "
                        "norm before the positional convolution), so it cannot stream.")
    for layer in roles.layers(spec):
        a = spec.attention(f"{layer}.attention")
        if a.heads and not (a.options.get("causal") or a.options.get("direction") == "causal"):
            raise SpecError(f"Block {layer}.attention: mixer {a.mixer} looks at later frames, so it cannot stream; "
                            "convert it to a causal one (direction: causal, or causal: true).")


class Causal:
    """Samples in, symbols out: `feed` as often as audio comes, then `finish`.

    Raises: SpecError for a model that looks ahead, with the block.
    """

    def __init__(self, model: Slim, chunk: int = 512, dtype: str | None = None):
        _check(model.spec)
        self.model, self.chunk, self.dtype = model, chunk, dtype
        self.stride, self.field = geometry(model.spec)
        self.delay = model.spec["num_conv_pos_embeddings"] - 1 - model.spec["num_conv_pos_embeddings"] // 2
        self.wave, self.at = np.zeros(0, np.float32), 0   # samples from frame `at` on
        self.state = _start(model.spec)

    def feed(self, wave: np.ndarray) -> np.ndarray:
        """Normalised samples (N,) that follow those before -> the symbols of the frames that are certain now."""
        self.wave = np.concatenate([self.wave, wave.astype(np.float32)])
        out = [np.zeros(0, np.int32)]
        while len(self.wave) >= (self.chunk - 1) * self.stride + self.field:
            out.append(self._step(None))
        return np.concatenate(out)

    def finish(self) -> np.ndarray:
        """The symbols of the remaining frames."""
        total = self.at + max((len(self.wave) - self.field) // self.stride + 1, 0)
        out = [np.zeros(0, np.int32)]
        while self.at < total + self.delay:
            out.append(self._step(total))
        return np.concatenate(out)

    def _step(self, total: int | None) -> np.ndarray:
        size = (self.chunk - 1) * self.stride + self.field
        part = np.zeros((1, size), np.float32)
        part[0, : len(self.wave)] = self.wave[:size]
        bound = np.int32(2**31 - 1 if total is None else total)
        self.state, ids = _step(self.model, self.state, part, np.int32(self.at), bound, self.dtype)
        self.wave, first = self.wave[self.chunk * self.stride :], self.at - self.delay
        self.at += self.chunk
        return np.asarray(ids)[max(-first, 0) : self.chunk if total is None else max(total - first, 0)]


def _start(spec):
    """The state before the first frame: projected frames for the positional convolution, and that of every mixer."""
    module = bind.skeleton(spec)
    encoder = bind.submodule(module, roles.prefix(spec).rstrip("."))
    mixers = tuple(layer.attention.state(1) if layer.attention.heads else () for layer in encoder.encoder.layers)
    return jnp.zeros((1, spec["num_conv_pos_embeddings"] - 1, spec["hidden_size"])), mixers


@functools.partial(jax.jit, static_argnames="dtype")
def _step(model: Slim, state, wave, at, total, dtype):
    """Frames `at` to `at + chunk` of the front end -> state, symbols of the frames `delay` earlier. (chunk,)"""
    spec, params = model.spec, model.params
    if dtype is not None:
        params = {k: v.astype(dtype) if v.ndim > 1 and not k.endswith("A_log") else v for k, v in params.items()}
    module, call = bind.bind(spec, params), layers.Call()
    encoder = bind.submodule(module, roles.prefix(spec).rstrip("."))
    transformer, (before, old) = encoder.encoder, state
    x = encoder.feature_extractor(wave.astype(encoder.feature_projection.projection.weight.dtype), call)
    frame = at + jnp.arange(x.shape[1])
    x = jnp.where((frame < total)[None, :, None], encoder.feature_projection(x), 0)
    window = jnp.concatenate([before.astype(x.dtype), x], 1)                             # (1, K - 1 + chunk, D)
    left = spec["num_conv_pos_embeddings"] // 2
    cut = lambda y: y[:, left : left + x.shape[1]]  # noqa: E731
    h = cut(window) + cut(transformer.pos_conv_embed(window, call))
    h = h if transformer.pre else transformer.layer_norm(h)
    frame = frame - (before.shape[1] - left)
    mask, new = ((frame >= 0) & (frame < total))[None], []
    for layer, one in zip(transformer.layers, old, strict=True):
        def mix(x, mask, call, layer=layer, one=one):
            if not layer.attention.heads:
                new.append(one)
                return layer.attention(x, mask, call)
            y, after = layer.attention.extend(x, mask, one, call)
            new.append(after)
            return y

        h, _ = layer(h, mask, call, mix=mix)
    h = transformer.layer_norm(h) if transformer.pre else h
    logits = bind.submodule(module, roles.roles(spec, "head")["owner"])(h)
    return (window[:, x.shape[1] :].astype(jnp.float32), tuple(new)), jnp.argmax(logits[0], -1).astype(jnp.int32)


def windows(wave: np.ndarray, spec, chunk: int, context: int) -> Iterator[tuple[np.ndarray, int, int, int]]:
    """Pieces of a wave (samples,) for any model, `chunk` frames each with `context` frames on both sides.

    Yields: (samples, padded to one length), how many of them are audio, first and last frame of the piece to keep.
    """
    stride, field = geometry(spec)
    total, size = max((len(wave) - field) // stride + 1, 0), chunk + 2 * context
    for at in range(0, total, chunk):
        start = max(min(at - context, total - size), 0)  # at both ends the window stays whole
        part = wave[start * stride : (start + size - 1) * stride + field]
        padded = np.zeros((size - 1) * stride + field, np.float32)
        padded[: len(part)] = part
        yield padded, len(part), at - start, min(at + chunk, total) - start
