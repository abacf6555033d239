"""A model as an s3prl-style upstream: a list of waveforms in, a dict with `hidden_states` out.

    from jaxslim.upstream import Upstream
    upstream = Upstream("runs/generate/final")
    out = upstream([wave_1, wave_2])       # (samples,) each, 16 kHz
    out["hidden_states"]                   # tuple of (B, T, D), embedding first; zero beyond each clip
    upstream.lengths([16000])              # frames of clips of so many samples

In s3prl (https://github.com/s3prl/s3prl) an upstream is a torch.nn.Module; `UpstreamExpert(ckpt)` is one:

    # hubconf.py
    from jaxslim.upstream import UpstreamExpert
    def jaxslim(ckpt, *args, **kwargs):
        return UpstreamExpert(ckpt)

The model is frozen: nothing is differentiated through it. Waveforms are normalised as the model's processor says, and
padding is masked in all families, also in those that `transformers` runs without a mask (s3prl does so, too).
"""
from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim import formulas, hub
from jaxslim.data.extractor import Extractor
from jaxslim.decode import octave
from jaxslim.slim import Slim, inputs


class Upstream:
    """Frozen speech model that gives every hidden state.

    Args:
      model: a Slim, or whatever hub.load reads.
      extractor: what the model takes of audio; None: read from the model's folder (of a Slim: waveforms of mean 0 and
        variance 1).
      dtype: compute dtype; None is the parameters'.
    """

    sampling_rate = 16000

    def __init__(self, model: Slim | str | os.PathLike, extractor: Extractor | None = None, dtype: Any = None):
        if not isinstance(model, Slim):
            folder = hub.folder(model)
            model = hub.load(model)
            extractor = extractor or Extractor.from_pretrained(folder, model.spec.family)
        if model.spec.family in formulas.TEXT:
            raise ValueError(f"A {model.spec.family} model has no hidden states of audio.")
        self.model = model.replace(params=jax.device_put(model.params))
        self.extractor, self.dtype = extractor or Extractor(), None if dtype is None else jnp.dtype(dtype).name
        if self.extractor.sampling_rate != self.sampling_rate:
            raise ValueError(f"The model hears {self.extractor.sampling_rate} Hz; an upstream of s3prl hears 16000.")

    def __call__(self, wavs: Sequence[Any]) -> dict[str, Any]:
        """Waveforms (samples,), numpy, JAX or torch -> `hidden_states`, a tuple of (B, T, D), and `last_hidden_state`
        (B, T, D), fp32; torch tensors on the device of the first waveform if that is one, else numpy arrays."""
        if not len(wavs):
            raise ValueError("An upstream takes a list of at least one waveform.")
        waves = [_numpy(w, i) for i, w in enumerate(wavs)]
        states, last, lengths = self._run(waves)
        longest = max(lengths)
        back = _torch_like(wavs[0])
        clip = lambda x: back(np.ascontiguousarray(x[:, :longest]))  # noqa: E731
        return {"hidden_states": tuple(map(clip, states)), "last_hidden_state": clip(last)}

    def features(self, waves: Sequence[np.ndarray], rows: int = 0, samples: int = 0) -> list[np.ndarray]:
        """Waveforms (samples,) -> the hidden states (L, T, D) of each, without padding. `rows`, `samples`: the shape
        that they are padded to, for few compilations; 0 = the next that fits."""
        states, _, lengths = self._run([_numpy(w, i) for i, w in enumerate(waves)], rows, samples)
        return [states[:, row, :length] for row, length in enumerate(lengths)]

    def lengths(self, samples: Sequence[int]) -> list[int]:
        """Frames of clips of so many samples."""
        spec = self.model.spec
        if spec.family == "whisper":   # its encoder always sees the whole window
            return [min(-(-n // 320), spec["max_source_positions"]) for n in samples]
        return [formulas.lengths(spec, n / self.sampling_rate)[-1] for n in samples]

    def get_downsample_rates(self, key: str = "hidden_states") -> int:
        """Samples a frame, as s3prl asks."""
        samples = 20 * self.sampling_rate
        return round(samples / self.lengths([samples])[0])

    def _run(self, waves: list[np.ndarray], rows: int = 0, samples: int = 0):
        """States (L, B, T, D), last hidden state (B, T, D), frames of each clip."""
        rows = rows or 1 << (len(waves) - 1).bit_length()   # few shapes: a power of two, eight lengths an octave
        longest = max(map(len, waves)) / self.sampling_rate
        present = [*waves, *[None] * (rows - len(waves))]
        batch = self.extractor(present, samples or round(octave(longest) * self.sampling_rate))
        batch["attention_mask"][len(waves):, :1] = 1   # a row without any frame would divide by zero
        if self.model.spec.family == "whisper":
            batch["decoder_input_ids"] = np.zeros((rows, 1), np.int32)
        states, last = jax.device_get(_states(self.model, inputs(batch), self.dtype))
        lengths = [min(n, states.shape[2]) for n in self.lengths([len(w) for w in waves])]
        valid = np.arange(states.shape[2]) < np.array(lengths)[:, None]
        clean = lambda x: np.where(valid[..., None], x[..., : len(waves), :, :], 0.0)  # noqa: E731
        return clean(states), clean(last), lengths


@functools.partial(jax.jit, static_argnames="dtype")
def _states(model: Slim, batch, dtype):
    out = model(output_hidden_states=True, dtype=dtype, **batch)
    states, last = out.hidden_states, out.last_hidden_state
    if out.encoder_hidden_states is not None:
        states, last = out.encoder_hidden_states, out.encoder_last_hidden_state
    return jnp.stack([x.astype(jnp.float32) for x in states]), last.astype(jnp.float32)


def _numpy(wave: Any, row: int) -> np.ndarray:
    wave = np.asarray(wave.detach().cpu() if hasattr(wave, "detach") else wave, np.float32)
    if wave.ndim != 1 or wave.size < 400:
        raise ValueError(f"Waveform {row} has shape {wave.shape}; an upstream takes (samples,) at 16 kHz, 400 or more.")
    return wave


def _torch_like(wave: Any):
    if not hasattr(wave, "detach"):
        return lambda x: x
    import torch

    return lambda x: torch.from_numpy(x).to(wave.device)


def __getattr__(name: str):
    """UpstreamExpert, made when it is asked for: torch is no dependency of this package."""
    if name != "UpstreamExpert":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torch import nn

    class UpstreamExpert(nn.Module):
        """s3prl's interface: `UpstreamExpert(ckpt)` with a folder, bundled:NAME or hub id; `forward(wavs)`."""

        def __init__(self, ckpt: str, model_config: str | None = None, **kwargs):
            super().__init__()
            self.upstream = Upstream(ckpt)

        def forward(self, wavs):
            return self.upstream(wavs)

        def get_downsample_rates(self, key: str = "hidden_states") -> int:
            return self.upstream.get_downsample_rates(key)

    globals()[name] = UpstreamExpert
    return UpstreamExpert
