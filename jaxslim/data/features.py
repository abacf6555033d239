"""Features of the families that read no waveforms, made on the host: what transformers' extractors make of audio.

* `parakeet`: log-mel of pre-emphasised audio, each bin of a clip normalised (`ParakeetFeatureExtractor`, needs torch).
* `fbank`: Kaldi's filter bank, two frames stacked (`SeamlessM4TFeatureExtractor`, of w2v-BERT).

Both work in fp64 inside, at 16 kHz, on windows of 25 ms every 10 ms. Whisper's features are mel.py's.
"""
from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from jaxslim.data import mel

SIZE, HOP, FFT, EMPHASIS = 400, 160, 512, 0.97  # samples of a window and of a step, bins, pre-emphasis of both


def parakeet(waves: Sequence[np.ndarray | None], mels: int = 80, samples: int | None = None) -> dict[str, np.ndarray]:
    """Mono clips at 16 kHz -> input_features (B, T, mels), attention_mask (B, T), padded to the longest clip or to the
    frames of `samples`; None is a row of padding.

    Frames are centred, so there is one more than whole steps; like the extractor's, it is masked. Mean and deviation
    of a bin are those of the clip's own frames.
    """
    rows = []
    for wave in waves:
        if wave is None:
            rows.append(np.zeros((0, mels)))
            continue
        x = np.asarray(wave, np.float64)
        x = np.concatenate([x[:1], x[1:] - EMPHASIS * x[:-1]])
        frames = _frames(np.pad(x, (FFT // 2, FFT // 2)), FFT)                                        # (T, 512)
        log = np.log(_power(frames * _centred(), FFT) @ mel.filters(mels, FFT) + 2.0**-24)            # (T, M)
        log = log[: len(x) // HOP]
        if len(log) < 2:
            raise ValueError(f"Audio of {len(x)} samples is too short for features: at least {2 * HOP} are needed.")
        rows.append((log - log.mean(0)) / (log.std(0, ddof=1) + 1e-5))
    return _batch(rows, (samples or max(len(wave) for wave in waves if wave is not None)) // HOP + 1)


def fbank(waves: Sequence[np.ndarray | None], mels: int = 80, stack: int = 2,
          samples: int | None = None) -> dict[str, np.ndarray]:
    """Mono clips at 16 kHz -> input_features (B, T, stack * mels), attention_mask (B, T), padded to the longest clip or
    to the frames of `samples`; None is a row of padding.

    Whole windows only. A last frame that fills no stack is padded and masked, as the extractor does it.
    """
    rows = []
    for wave in waves:
        if wave is None:
            rows.append(np.zeros((0, mels)))
            continue
        x = np.asarray(wave, np.float64) * 2**15                                                      # 16-bit numbers
        if len(x) < SIZE + HOP:
            raise ValueError(f"Audio of {len(x)} samples is too short for features: at least {SIZE + HOP} are needed.")
        frames = _frames(x, SIZE)                                                                     # (T, 400)
        frames = frames - frames.mean(1, keepdims=True)
        frames = np.concatenate([frames[:, :1] * (1 - EMPHASIS), frames[:, 1:] - EMPHASIS * frames[:, :-1]], 1)
        power = _power(frames * np.hanning(SIZE) ** 0.85, FFT)                                        # Povey's window
        log = np.log(np.maximum(power @ _kaldi(mels), 2.0**-23))                                      # (T, M)
        rows.append((log - log.mean(0)) / np.sqrt(log.var(0, ddof=1) + 1e-7))
    longest = (samples - SIZE) // HOP + 1 if samples else max(map(len, rows))
    out = _batch(rows, -(-longest // stack) * stack)
    values, mask = out["input_features"], out["attention_mask"]
    return {"input_features": values.reshape(len(rows), -1, stack * mels),
            "attention_mask": mask[:, stack - 1 :: stack]}


def _frames(x: np.ndarray, size: int) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(x, size)[::HOP]


def _power(frames: np.ndarray, size: int) -> np.ndarray:
    spectrum = np.fft.rfft(frames, size)
    return spectrum.real**2 + spectrum.imag**2


def _batch(rows: list[np.ndarray], length: int) -> dict[str, np.ndarray]:
    values, mask = np.zeros((len(rows), length, rows[0].shape[1]), np.float32), np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        values[i, : len(row)], mask[i, : len(row)] = row, 1
    return {"input_features": values, "attention_mask": mask}


@functools.lru_cache
def _centred() -> np.ndarray:
    """A symmetric Hann window in the middle of an FFT's frame."""
    side = (FFT - SIZE) // 2
    return np.pad(np.hanning(SIZE), (side, side))


@functools.lru_cache
def _kaldi(mels: int) -> np.ndarray:
    """Triangular filters (257, mels) from 20 Hz to 8 kHz, straight on Kaldi's mel scale and not normalised."""
    scale = lambda hertz: 1127.0 * np.log(1.0 + hertz / 700.0)  # noqa: E731
    marks = np.linspace(scale(20.0), scale(mel.RATE / 2), mels + 2)
    slopes = marks[None, :] - scale(mel.RATE / FFT * np.arange(FFT // 2 + 1))[:, None]                # (F, M + 2)
    width = np.diff(marks)
    return np.maximum(0, np.minimum(-slopes[:, :-2] / width[:-1], slopes[:, 2:] / width[1:]))
