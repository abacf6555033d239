"""What a model takes of audio: its feature extractor, as the files of its folder describe it.

An Extractor turns clips into the arrays that go into the model; the number of clips and the length they are padded to
decide the shapes, nothing else, so that few programs are compiled.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxslim.data import audio, features, mel
from jaxslim.data.rows import DataError

# family -> (kind of input, keys of the extractor's file that say how many features a frame has: their product)
KINDS = {"wav2vec2-bert": ("fbank", ("num_mel_bins", "stride")), "parakeet_ctc": ("parakeet", ("feature_size",)),
         "parakeet_encoder": ("parakeet", ("feature_size",)), "whisper": ("log-mel", ("feature_size",))}
FLOOR = 0.025  # seconds: shorter than the first frame of every wav2vec2-like front end (400 samples at 16 kHz)
DEFAULTS = {"num_mel_bins": 80, "feature_size": 80, "stride": 2}   # of transformers' extractors


@dataclasses.dataclass(frozen=True)
class Extractor:
    """Clips -> `input_values` or `input_features`, and `attention_mask`, equal to what transformers makes of them."""

    kind: str = "values"                # values: the waveform | fbank (w2v-BERT) | parakeet | log-mel (Whisper)
    sampling_rate: int = 16000
    do_normalize: bool = True           # values: each clip to mean 0 and variance 1
    return_attention_mask: bool = True  # False: the model was trained on zero-padded audio without a mask
    mels: int = 80
    stride: int = 2                     # fbank: frames that make up one
    window: float = 0.0                 # log-mel: seconds that shorter clips are padded to

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, family: str = "wav2vec2") -> Extractor:
        """Reads preprocessor_config.json or processor_config.json of a HF folder. Raises DataError without either."""
        values = read_json(folder, "preprocessor_config.json")
        if values is None:
            values = (read_json(folder, "processor_config.json") or {}).get("feature_extractor")
        if values is None:
            raise DataError(
                f"{folder} has neither preprocessor_config.json nor a feature_extractor in processor_config.json; "
                "they say how the model wants its audio (rate, normalisation)."
            )
        rate = values.get("sampling_rate", 16000)
        if family not in KINDS:
            return cls("values", rate, values.get("do_normalize", True),
                       values.get("return_attention_mask", False))  # the default of transformers
        if rate != mel.RATE:
            raise DataError(f"{folder}: its features are for audio at {rate} Hz; those of {family} are made at 16000.")
        kind, keys = KINDS[family]
        sizes = {key: values.get(key, DEFAULTS[key]) for key in keys}
        return cls(kind, rate, False, True, sizes[keys[0]], sizes.get("stride", 1),
                   values.get("chunk_length", 30) if kind == "log-mel" else 0.0)

    @property
    def size(self) -> int:
        """Features of a frame (1: samples)."""
        return 1 if self.kind == "values" else self.mels * self.stride

    @property
    def shortest(self) -> float:
        """Seconds below which a clip gives the model no frame."""
        return 0.035 if self.kind in ("fbank", "parakeet") else FLOOR

    def normalize(self, wave: np.ndarray) -> np.ndarray:
        """(samples,) -> float32 (samples,) as a model of waveforms wants it."""
        return audio.normalize(wave) if self.do_normalize else wave.astype(np.float32, copy=False)

    def __call__(self, waves: Sequence[np.ndarray | None], samples: int) -> dict[str, np.ndarray]:
        """Clips of at most `samples` samples -> the model's inputs, padded as if each were so long.

        None stands for a row without a clip: zeros, and a mask of zeros.
        """
        if self.kind == "values":
            out = {"input_values": np.zeros((len(waves), samples), np.float32),
                   "attention_mask": np.zeros((len(waves), samples), np.int32)}  # fmt: skip
            for row, wave in enumerate(waves):
                if wave is not None:
                    out["input_values"][row, : len(wave)] = self.normalize(wave)
                    out["attention_mask"][row, : len(wave)] = 1
            return out
        if self.kind == "log-mel":
            samples = max(samples, round(self.window * mel.RATE))
            present = [np.zeros(0, np.float32) if wave is None else wave for wave in waves]
            values, mask = mel.features(present, self.mels, samples=samples)
            return {"input_features": np.asarray(values), "attention_mask": mask}
        if self.kind == "fbank":
            return features.fbank(waves, self.mels, self.stride, samples=samples)
        return features.parakeet(waves, self.mels, samples=samples)


def read_json(folder: str | os.PathLike, name: str) -> dict[str, Any] | None:
    """A JSON object of a folder, None if it is not there. Raises DataError for one that is broken."""
    from etils import epath

    path = epath.Path(folder) / name
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value
