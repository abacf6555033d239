"""Clips changed at random while a model trains: callables (wave, rng) -> wave; `stretch` is the largest factor by which
the length can grow. robust.py tests models under the same changes."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxslim.data.audio import resample


@dataclasses.dataclass(frozen=True)
class speed_perturb:
    """Plays a clip at one of `rates`, chosen at random: 0.9 is slower, longer and lower."""

    rates: tuple[float, ...] = (0.9, 1.0, 1.1)

    @property
    def stretch(self) -> float:
        return 1.0 / min(self.rates)

    def __call__(self, wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        rate = self.rates[int(rng.integers(len(self.rates)))]
        return resample(wave, round(1000 * rate), 1000)


@dataclasses.dataclass(frozen=True)
class gain:
    """Changes the level by a random number of decibels (of no effect on models that normalise each clip)."""

    low: float = -6.0
    high: float = 6.0
    stretch: float = dataclasses.field(default=1.0, init=False)

    def __call__(self, wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return wave * np.float32(10 ** (rng.uniform(self.low, self.high) / 20))


@dataclasses.dataclass(frozen=True)
class noise:
    """Adds white noise at a random signal-to-noise ratio, in decibels."""

    low: float = 10.0
    high: float = 40.0
    stretch: float = dataclasses.field(default=1.0, init=False)

    def __call__(self, wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        scale = wave.std() * 10 ** (-rng.uniform(self.low, self.high) / 20)
        return wave + rng.standard_normal(wave.shape, dtype=np.float32) * np.float32(scale)


@dataclasses.dataclass(frozen=True, init=False)
class compose:
    """Several augmentations, one after another."""

    steps: tuple[Callable, ...]

    def __init__(self, *steps: Callable):
        object.__setattr__(self, "steps", steps)

    @property
    def stretch(self) -> float:
        return math.prod(getattr(step, "stretch", 1.0) for step in self.steps)

    def __call__(self, wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for step in self.steps:
            wave = step(wave, rng)
        return wave


@dataclasses.dataclass(frozen=True)
class telephone:
    """300 to 3400 Hz at 8 kHz in eight bits (mu-law, ITU G.711), and back."""

    rate: int = 16000
    stretch: float = dataclasses.field(default=1.0, init=False)

    def __call__(self, wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        from scipy import signal

        band = signal.butter(4, (300, 3400), "bandpass", fs=8000, output="sos")
        low = signal.sosfilt(band, resample(wave, self.rate, 8000))
        top = np.abs(low).max() or 1.0
        squeezed = np.sign(low) * np.log1p(255 * np.abs(low / top)) / np.log(256)
        squeezed = np.round(squeezed * 127) / 127
        out = np.sign(squeezed) * np.expm1(np.abs(squeezed) * np.log(256)) / 255 * top
        out = resample(out.astype(np.float32), 8000, self.rate)
        return np.pad(out, (0, max(len(wave) - len(out), 0)))[: len(wave)]


@dataclasses.dataclass(frozen=True)
class room:
    """Exponentially decaying noise as the room's answer: `low` to `high` seconds to -60 dB, 6 dB below the direct."""

    low: float = 0.1
    high: float = 0.6
    rate: int = 16000
    stretch: float = dataclasses.field(default=1.0, init=False)

    def __call__(self, wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        from scipy import signal

        n = round(rng.uniform(self.low, self.high) * self.rate)
        tail = rng.standard_normal(n) * 10 ** (-3 * np.arange(n) / n)
        tail[: round(0.005 * self.rate)] = 0
        tail *= 0.5 / np.sqrt(np.sum(tail**2))
        tail[0] = 1.0
        return signal.fftconvolve(wave, tail)[: len(wave)].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class sometimes:
    """A change that happens to a clip with some probability."""

    change: Callable
    chance: float

    @property
    def stretch(self) -> float:
        return max(self.change.stretch, 1.0)

    def __call__(self, wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return self.change(wave, rng) if rng.random() < self.chance else wave


KINDS = {"noise": noise, "gain": gain, "telephone": telephone, "room": room}


def build(speeds: Sequence[float], chances: Mapping[str, float], rate: int) -> Callable | None:
    """`speed_perturb` and `augment` of config.Train as one callable; None for none.

    `chances`: a key of KINDS -> probability; rooms and telephones come before noise.
    """
    steps: list[Callable] = [speed_perturb(tuple(speeds))] if speeds else []
    for name in ("gain", "room", "telephone", "noise"):
        if chances.get(name):
            change = KINDS[name](rate=rate) if name in ("room", "telephone") else KINDS[name]()
            steps.append(sometimes(change, chances[name]))
    return compose(*steps) if len(steps) > 1 else steps[0] if steps else None
