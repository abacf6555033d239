"""Log-mel features of Whisper, on the device: what `WhisperFeatureExtractor` of transformers computes, to 1e-5.

Its two programs differ from each other by more (6e-5 on speech): with PyTorch it works in fp32, where the quietest
bins of a frame drown in the rounding of the loudest; with numpy in fp64. This is the fp64 one (fp32 on TPU).

Windows of 25 ms (Hann) every 10 ms, power spectrum, triangular filters on Slaney's mel scale (as in librosa, up to
8 kHz), log10, the range below the loudest 8 decades cut off, scaled: (log + 4) / 4 (Whisper, arXiv 2212.04356, section
2.2). The last frame, centred on the end of the audio, is dropped, so 30 s make 3000 frames.
"""
from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

RATE, SIZE, HOP = 16000, 400, 160   # samples a second, a window, a frame
WINDOW = 30 * RATE                  # samples that the model takes at once


def features(waves: Sequence[np.ndarray], mels: int = 80, *, longest: bool = False,
             samples: int = WINDOW) -> tuple[jax.Array, np.ndarray]:
    """Mono clips at 16 kHz -> input_features (B, mels, T) and attention_mask (B, T), 1 where there is audio.

    Args:
      waves: (samples,) float arrays of any length.
      mels: 80, or 128 for large-v3 and turbo.
      longest: False pads (and cuts) every clip to 30 s; True pads to the longest clip, which is what decoding of long
        audio wants (`generate` cuts the windows itself). The loudest moment of the whole clip sets the range.
      samples: to which every clip is padded or cut unless `longest`.
    """
    waves = [np.asarray(w, np.float32).reshape(-1) for w in waves]
    length = max(map(len, waves)) if longest else samples
    if length < SIZE:
        raise ValueError(f"Audio of {length} samples is shorter than one window ({SIZE} samples, 25 ms).")
    batch = np.stack([np.pad(w[:length], (0, max(0, length - len(w)))) for w in waves])
    mask = (np.arange(length // HOP) * HOP < np.array([len(w) for w in waves])[:, None]).astype(np.int32)
    return log_mel(batch, mels), mask


def log_mel(waves: jax.Array | np.ndarray, mels: int = 80) -> jax.Array:
    """Waveforms (B, samples) at 16 kHz -> (B, mels, samples // 160), fp32. Not for use inside a trace."""
    if jax.default_backend() == "tpu":
        return _log_mel(waves, mels, "float32")
    with jax.enable_x64(True):
        return _log_mel(waves, mels, "float64")


@functools.partial(jax.jit, static_argnames=("mels", "dtype"))
def _log_mel(waves, mels, dtype):
    x = jnp.pad(waves.astype(dtype), ((0, 0), (SIZE // 2, SIZE // 2)), mode="reflect")
    count = waves.shape[1] // HOP
    frames = x[:, np.arange(count)[:, None] * HOP + np.arange(SIZE)] * _hann().astype(dtype)  # (B, T, 400)
    spectrum = jnp.fft.rfft(frames)                                                     # (B, T, 201)
    power = spectrum.real**2 + spectrum.imag**2
    mel = jnp.einsum("btf,fm->bmt", power, filters(mels).astype(dtype), precision=jax.lax.Precision.HIGHEST)
    log = jnp.log10(jnp.maximum(mel, 1e-10))
    return (jnp.maximum(log, log.max((1, 2), keepdims=True) - 8.0) + 4.0).astype(jnp.float32) / 4


@functools.lru_cache
def filters(mels: int, size: int = SIZE, rate: int = RATE) -> np.ndarray:
    """Triangular filters (size // 2 + 1, mels) of equal area on Slaney's scale: linear to 1 kHz, then logarithmic."""
    step = np.log(6.4) / 27
    top = rate / 2
    marks = np.linspace(0.0, 15 + np.log(top / 1000) / step if top > 1000 else 3 * top / 200, mels + 2)
    hertz = np.where(marks < 15, 200 * marks / 3, 1000 * np.exp(step * (marks - 15)))
    slopes = hertz[None, :] - np.linspace(0, top, size // 2 + 1)[:, None]               # (F, M + 2)
    width = np.diff(hertz)
    bank = np.maximum(0, np.minimum(-slopes[:, :-2] / width[:-1], slopes[:, 2:] / width[1:]))
    return (bank * 2 / (hertz[2:] - hertz[:-2]))


@functools.lru_cache
def _hann() -> np.ndarray:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(SIZE) / SIZE))
