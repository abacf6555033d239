"""Audio files of any kind, rate and channel count -> float32 mono; and augmentation of the decoded wave.

soundfile reads WAV, FLAC, Ogg, Opus and MP3; PyAV (FFmpeg) reads the rest (m4a, mp4, webm, ...). Both are imported at
need.
"""

from __future__ import annotations

import contextlib
import io
import math
import os

import numpy as np

from jaxslim.data.rows import DataError

RATES = (1000, 1_000_000)   # Hz of what is taken for sound; a header that says another is damaged
INSTALL = "reading audio needs soundfile: pip install jaxslim[audio]"
LFS = b"version https://git-lfs.github.com/spec"


class AudioError(DataError):
    """One audio file cannot be used; the message names it and says why."""


def load(source: bytes | str | os.PathLike, sampling_rate: int = 16000, name: str | None = None) -> np.ndarray:
    """Decodes one clip.

    Args:
      source: the encoded file's bytes, a local path, or a URL that etils.epath opens (gs://, s3://).
      sampling_rate: of the result, in Hz.
      name: what to call bytes in errors; a path names itself.
    Returns:
      float32 (samples,), channels averaged, about -1 to 1.
    Raises:
      AudioError: missing, empty or corrupt file, Git LFS pointer, no samples, NaN or infinite samples.
      ImportError: neither soundfile nor PyAV is installed.
    """
    data, name = read(source, name)
    wave, rate = decode(data, name)
    if not RATES[0] <= rate <= RATES[1]:
        raise AudioError(f"{name} says that it has {rate} samples a second; its header is damaged.")
    wave = wave.mean(axis=1, dtype=np.float32) if wave.shape[1] != 1 else wave[:, 0]  # (samples,)
    if not wave.size:
        raise AudioError(f"{name} holds no audio samples.")
    if bad := int(np.count_nonzero(~np.isfinite(wave))):
        raise AudioError(f"{name} has {bad} samples that are NaN or infinite; export the file again.")
    return np.ascontiguousarray(resample(wave, rate, sampling_rate))


def seconds(source: bytes | str | os.PathLike, name: str | None = None) -> float:
    """Length of a clip in seconds, from its header where that suffices, else by decoding it. Errors as `load`."""
    sf = soundfile()
    if sf is not None:
        local = isinstance(source, (str, os.PathLike)) and "://" not in str(source)
        try:  # a local file is not read whole only to see its header
            info = sf.info(os.fspath(source) if local else io.BytesIO(read(source, name)[0]))
            if 0 < info.frames < 2**40:  # some streams say "unknown" by a huge number
                return info.frames / info.samplerate
        except (sf.LibsndfileError, TypeError):
            pass
    data, name = read(source, name)
    wave, rate = decode(data, name)
    if not len(wave):
        raise AudioError(f"{name} holds no audio samples.")
    return len(wave) / rate


def resample(wave: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """(samples,) at `rate` Hz -> (about samples * new_rate / rate,) float32, by soxr if installed, else scipy."""
    if rate == new_rate:
        return wave.astype(np.float32, copy=False)
    try:
        import soxr
    except ImportError:
        from scipy.signal import resample_poly

        common = math.gcd(int(rate), int(new_rate))
        return resample_poly(wave, new_rate // common, rate // common).astype(np.float32, copy=False)
    return soxr.resample(wave, rate, new_rate).astype(np.float32, copy=False)


def normalize(wave: np.ndarray) -> np.ndarray:
    """Zero mean, unit variance over the clip (samples,), as `do_normalize` of Wav2Vec2FeatureExtractor."""
    return ((wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)).astype(np.float32, copy=False)


def read(source, name=None) -> tuple[bytes, str]:
    """Encoded bytes and a name for messages, of a path, URL or bytes. Raises AudioError."""
    if isinstance(source, (str, os.PathLike)):
        name = name or os.fspath(source)
        try:
            if "://" in str(source):
                from etils import epath

                data = epath.Path(source).read_bytes()
            else:
                with open(source, "rb") as file:
                    data = file.read()
        except (KeyError, ImportError) as error:  # epath knows gs://, s3://, az://, and wants a package for each
            why = str(error) if isinstance(error, ImportError) else f"no reader for {str(source).partition('://')[0]}://"
            raise AudioError(f"{name} cannot be read: {why}.") from error
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
            raise AudioError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    else:
        data, name = source, name or "the audio given as bytes"
    if not len(data):
        raise AudioError(f"{name} is empty (0 bytes).")
    if bytes(data[: len(LFS)]) == LFS:
        raise AudioError(f"{name} is a Git LFS pointer, not audio; run `git lfs pull` where it came from.")
    return data, name


def soundfile():
    """The module, or None where it is not installed."""
    try:
        import soundfile
    except ImportError:
        return None
    except OSError as error:  # the package is there, the C library is not
        raise ImportError(f"soundfile finds no libsndfile ({error}); {INSTALL}") from error
    return soundfile


def decode(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """Encoded bytes -> float32 (samples, channels), rate. soundfile, then PyAV. Raises AudioError.

    Opus at 48 kHz goes to PyAV first: the same samples to 2e-7, in a third of the time.
    """
    if _opus_at_48(data):
        with contextlib.suppress(AudioError, ImportError):
            return _pyav(data, name, "")
    sf, why = soundfile(), "soundfile is not installed"
    if sf is not None:
        try:
            return sf.read(io.BytesIO(data), dtype="float32", always_2d=True)
        except (sf.LibsndfileError, TypeError, ValueError, MemoryError) as error:  # MemoryError: a length in the header
            why = str(getattr(error, "error_string", error)).rstrip(".")
    try:
        return _pyav(data, name, why)
    except ImportError:
        if sf is None:
            raise ImportError(INSTALL) from None
        raise AudioError(
            f"{name} is not readable as audio ({why}); if it is m4a, mp4 or webm, pip install av."
        ) from None


def _opus_at_48(data: bytes) -> bool:
    """Whether this is Ogg Opus of one or two channels that libsndfile would decode at 48 kHz (RFC 7845, 5.1)."""
    at = data.find(b"OpusHead", 0, 64)
    return (at >= 0 and len(data) > at + 16 and data[at + 9] in (1, 2)
            and int.from_bytes(data[at + 12 : at + 16], "little") not in (8000, 12000, 16000, 24000))


def _pyav(data: bytes, name: str, why: str) -> tuple[np.ndarray, int]:
    import av

    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.audio:
                raise AudioError(f"{name} has no audio track.")
            stream = container.streams.audio[0]
            planar = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
            parts = [part.to_ndarray() for frame in container.decode(stream) for part in planar.resample(frame)]
            parts += [part.to_ndarray() for part in planar.resample(None)]
            rate = stream.rate
    except Exception as error:  # FFmpegError, and what the wrapper makes of a damaged header: AttributeError, ...
        if isinstance(error, AudioError):
            raise
        raise AudioError(
            f"{name} is not readable as audio ({why}); the file is corrupt or of an unknown kind."
        ) from error
    if not parts:
        raise AudioError(f"{name} holds no audio samples.")
    return np.concatenate(parts, axis=1).T, rate
