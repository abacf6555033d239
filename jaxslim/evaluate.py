"""Word error rate with its interval, and the share of frames on which two models agree.

Models with a CTC head decode greedily: the argmax runs on the device, collapsing and scoring on the host; one
executable per bucket shape, kept between calls. Whisper decodes as `generate` does, with the options of its
generation_config.json. Classifiers are scored by classify.py, language models by perplexity.py.

Padding. Models whose processor says `return_attention_mask: true` get the mask, and padding changes nothing. Models
without (group-norm base models) were trained on bare audio: each clip runs alone at its exact length, as the pipeline
of `transformers` does, unless there are more than 256 different lengths or `buckets` are given: then each runs alone,
zero padded to its bucket, as `transformers` does to a batch, which moves their WER a little. `Result["padding"]` says
which: "masked", "exact" or "zeros".
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxslim.data import Batches, CausalTask, Classes, DataError, Rows, load_rows, suggest_buckets, task_of
from jaxslim.decode import Greedy, decoder, long_enough, single
from jaxslim.score import Result, bootstrap, paired_bootstrap, score
from jaxslim.slim import Slim

__all__ = ["Result", "bootstrap", "evaluate", "frame_agreement", "paired_bootstrap", "render", "score"]

EXACT_LIMIT = 256  # different lengths up to which a model without mask gets each clip at its own length


def resolve(model: Slim | str, data, task, source, limit, language=None, heads=("ctc", "seq2seq")):
    """(Slim, Rows, task). `heads` are those that the caller can work with."""
    if isinstance(model, (str, os.PathLike)) or task is None:
        from jaxslim import hub

        if task is None:
            source = source or (model if not isinstance(model, Slim) else None)
            if source is None:
                raise ValueError("Give task= or source= (the folder or name whose vocabulary the model uses).")
        if not isinstance(model, Slim):
            adapted = language and hub.read_config(model).get("adapter_attn_dim")  # MMS: a language is a part of it
            model = hub.load(model, language=language if adapted else None)
        task = task or task_of(model.spec, hub.folder(source), language)
    if model.spec.head not in heads:
        raise ValueError(f"This {model.spec.family} model has the head {model.spec.head!r}; needed is "
                         f"{' or '.join(map(repr, heads))}.")
    return model, load_rows(data, limit=limit), task


class _Singles:
    """Batches of one clip at its exact length, without mask."""

    def __init__(self, rows: Rows, task, max_skipped: float):
        self.rows, self.task, self.max_skipped, self.skipped = rows, task, max_skipped, []

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for i in range(len(self.rows)):
            try:
                wave = long_enough(self.rows.audio(i, self.task.sampling_rate), self.task)
            except DataError as error:
                self.skipped.append((self.rows.column("id")[i], str(error)))
                if len(self.skipped) > self.max_skipped * len(self.rows):
                    raise DataError(f"{len(self.skipped)} of {len(self.rows)} rows of {self.rows.name} are unusable, "
                                    f"more than max_skipped = {self.max_skipped:g} allows: {error}") from error
                continue
            yield single(wave, self.task) | {"row": np.array([i], np.int32)}


class _Masked:
    """data.Batches; the mask is left out for models that take none."""

    def __init__(self, batches: Batches, mask: bool):
        self.batches, self.mask = batches, mask

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for batch in self.batches:
            if not self.mask:
                del batch["attention_mask"]
            yield batch

    @property
    def skipped(self) -> list[tuple[str, str]]:
        return self.batches.skipped


def batches_of(rows: Rows, task, forward, batch_size, batch_seconds, buckets, max_skipped):
    """(iterable of batches, with `skipped`; kind of padding)."""
    masked = task.extractor.return_attention_mask
    lengths = [] if buckets else [_duration(rows, i) for i in range(len(rows))]
    if not masked and not buckets and len(set(lengths)) <= EXACT_LIMIT:
        forward.replicate = True  # one clip at a time, the same on every device and process
        return _Singles(rows, task, max_skipped), "exact"
    if not masked:
        batch_size, batch_seconds = 1, None
    size = {"batch_seconds": batch_seconds} if batch_seconds else {"batch_size": batch_size}
    if not buckets and max(lengths, default=0) > 0:  # another bucket costs a compilation: few for a short test set
        lengths = [max(x, task.extractor.window) for x in lengths if x]
        buckets = suggest_buckets(lengths, min(6, 2 + int(sum(lengths) // 600)), batch_size or 1)
    several = forward.mesh is not None and jax.process_count() > 1
    host = {"host": jax.process_index(), "hosts": jax.process_count()} if several else {}
    batches = Batches(rows, task, buckets=buckets, shuffle=False, epochs=1, labels=False, max_skipped=max_skipped,
                      multiple_of=forward.multiple, **size, **host)  # fmt: skip
    return _Masked(batches, masked), "masked" if masked else "zeros"


def _duration(rows: Rows, i: int) -> float:
    try:
        return rows.duration(i)
    except DataError:
        return 0.0  # named as skipped when it is decoded


def track(items: Iterable, total: int, what: str, progress: bool) -> Iterator:
    """A progress bar on stderr, if that is a terminal and this is process 0."""
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True)
    shown = progress and console.is_terminal and jax.process_index() == 0
    return bars.track(items, what, total, console=console, transient=True, disable=not shown)


# ---- what users call ----


def evaluate(model: Slim | str, data: str | Rows, *, task: Any = None, source: str | None = None,
             batch_size: int = 8, batch_seconds: float | None = None, buckets: Sequence[float] | None = None,
             dtype: Any = None, limit: int | None = None, normalize: str = "none", max_skipped: float = 0.05,
             predictions: str | os.PathLike | None = None, mesh: Any = None,
             language: str | None = None, beam: Any = None, progress: bool = True) -> Result:  # fmt: skip
    """WER of a speech model on DATA, by greedy CTC decoding or with its decoder; accuracy of a classifier; bits per
    character of a language model.

    Args:
      model: a Slim, or whatever hub.load reads.
      data: DATA (see data.load_rows) or Rows; rows without text are skipped, an empty text counts.
      task: as data.task_of gives it; by default with the files of `source` (a folder or name), by default those of
        `model` given by name.
      batch_size, batch_seconds, buckets: as in data.Batches; by default 2 to 6 buckets, by the hours of audio.
      dtype: compute dtype; None is the parameters'.
      limit: only the first rows.
      normalize: of both texts before scoring, see `score`; predictions keep the raw text.
      max_skipped: more unusable rows than this fraction raise DataError.
      predictions: JSONL to write: audio_filepath, duration, time, text, pred_text (as the Open ASR Leaderboard), id,
        words, errors, characters, character_errors, and the data's other columns.
      mesh: jax Mesh (train.mesh.make) to split batches and parameters over; by default that of the parameters.
      language: of a Whisper or MMS model; None: Whisper finds out itself, MMS speaks the one that is stored.
      beam: of CTC models, a `beam.Search` instead of greedy decoding.
    Returns:
      of a classifier what `classify` returns, of a language model what `perplexity.bits` returns; else
      the keys of `score`, and audio_seconds, seconds (forward and decoding; compiling and reading audio not
      included), rtfx = audio_seconds / seconds, compile_seconds, frames, padding, skipped (how many rows), fingerprint.
    """
    model, rows, task = resolve(model, data, task, source, limit, language,
                                ("ctc", "seq2seq", "classification", "causal"))
    if isinstance(task, Classes):
        from jaxslim.classify import classify

        return classify(model, rows, task, batch_size, dtype, max_skipped, predictions, mesh, batch_seconds, buckets)
    if isinstance(task, CausalTask):
        from jaxslim.perplexity import bits

        return bits(model, rows, task, batch_size, dtype, max_skipped, predictions, mesh)
    forward = decoder(model, task, mesh, dtype, scores=beam is not None)
    batches, padding = batches_of(rows, task, forward, batch_size, batch_seconds, buckets, max_skipped)
    texts, ids, found, spent = rows.column("text"), rows.column("id"), {}, 0.0
    for batch in track(batches, len(batches), "evaluating", progress):
        out, took = forward(batch)
        start = time.perf_counter()
        used = [b for b, i in enumerate(out["row"]) if i >= 0]
        decoded = [beam(out["scores"][b, : out["lengths"][b]], task) if beam is not None else
                   task.transcript(out["ids"][b, : out["lengths"][b]]) for b in used]
        took += time.perf_counter() - start
        spent += took
        for b, text in zip(used, decoded):
            share = float(out["samples"][b]) / float(out["samples"][used].sum())
            found[int(out["row"][b])] = {"text": text, "duration": float(out["samples"][b]) / task.sampling_rate,
                                         "time": took * share, "frames": int(out["lengths"][b])}  # fmt: skip
    scored = [i for i in sorted(found) if texts[i] is not None]
    if not scored:
        raise DataError(f"{rows.name} has no row with audio and text to score.")
    result = score([texts[i] for i in scored], [found[i]["text"] for i in scored], normalize)
    result.skipped_rows = _skipped(ids, texts, found, batches)
    audio, frames = (sum(row[key] for row in found.values()) for key in ("duration", "frames"))
    result |= {"audio_seconds": audio, "seconds": spent, "rtfx": audio / spent, "frames": frames, "padding": padding,
               "compile_seconds": forward.compile_seconds, "skipped": len(result.skipped_rows)}  # fmt: skip
    paths = rows.column("audio")
    result.utterances = [
        {"audio_filepath": (paths[i] or {}).get("path") or ids[i], "duration": round(found[i]["duration"], 4),
         "time": round(found[i]["time"], 6), "text": texts[i], "pred_text": found[i]["text"], "id": ids[i],
         **_more(rows, i), **counts}
        for i, counts in zip(scored, result.utterances)]  # fmt: skip
    if predictions is not None and jax.process_index() == 0:
        result.write(predictions)
    return result


def _more(rows: Rows, i: int) -> dict[str, Any]:
    """The data's other columns (speaker, language, ...), to slice by."""
    known = ("id", "audio", "text", "duration")
    return {k: v for k, v in rows.record(i).items() if k not in known and isinstance(v, (str, int, float))}


def _skipped(ids, texts, found, batches) -> list[tuple[str, str]]:
    """(row id, reason) of every row that is not in the score."""
    here = list(batches.skipped)
    named = {name for name, _ in here}
    elsewhere = [ids[i] for i in range(len(ids)) if i not in found and ids[i] not in named]  # decoded by another host
    return [*here, *((name, "unusable audio") for name in elsewhere),
            *((ids[i], "no text") for i in sorted(found) if texts[i] is None)]  # fmt: skip


def frame_agreement(model_a: Slim | str, model_b: Slim | str, data: str | Rows, *, task: Any = None,
                    source: str | None = None, batch_size: int = 8, dtype: Any = None, limit: int | None = None,
                    mesh: Any = None) -> float:  # fmt: skip
    """Share of valid frames on which two CTC models have the same most probable symbol. Arguments as `evaluate`."""
    model_a, rows, task = resolve(model_a, data, task, source, limit, heads=("ctc",))
    model_b, rows, task = resolve(model_b, rows, task, source, None, heads=("ctc",))
    first, second = Greedy(model_a, mesh, dtype), Greedy(model_b, mesh, dtype)
    batches, _ = batches_of(rows, task, first, batch_size, None, None, 1.0)
    same = total = 0
    for batch in batches:
        (a, _), (b, _) = first(batch), second(batch)
        if a["ids"].shape != b["ids"].shape:
            raise ValueError("The models have different frame rates, so their frames cannot be compared.")
        valid = (np.arange(a["ids"].shape[1]) < a["lengths"][:, None]) & (a["row"] >= 0)[:, None]   # (B, T)
        same += int(((a["ids"] == b["ids"]) & valid).sum())
        total += int(valid.sum())
    if not total:
        raise DataError(f"{rows.name} has no usable row.")
    return same / total


def render(result: Result) -> str:
    """What `evaluate` returned, in a few lines for the terminal."""
    if "accuracy" in result:
        from jaxslim import classify

        return classify.render(result)
    if "bits_per_character" in result:
        from jaxslim import perplexity

        return perplexity.render(result)
    if result["wer"] is None:
        rates = f"No reference words: {result['insertions']} words were heard where there are none."
    else:
        rates = (f"WER {100 * result['wer']:.1f} % (95 % interval {100 * result['wer_low']:.1f} to "
                 f"{100 * result['wer_high']:.1f}), CER {100 * result['cer']:.1f} %")  # fmt: skip
    lines = [
        rates,
        f"{result['n']} clips, {result['words']} words: {result['substitutions']} substituted, {result['deletions']} "
        f"deleted, {result['insertions']} inserted",
        f"{result['audio_seconds']:.1f} s of audio in {result['seconds']:.1f} s (RTFx {result['rtfx']:.1f}; compiling "
        f"took another {result['compile_seconds']:.1f} s)",
    ]
    if result["padding"] == "zeros":
        lines.append("This model takes no attention mask, so padding moves its WER a little (see jaxslim.evaluate).")
    if result["skipped"]:
        names = [f"{name}: {reason.rstrip('.')}" for name, reason in result.skipped_rows[:3]]
        more = f"; and {result['skipped'] - len(names)} more" if result["skipped"] > len(names) else ""
        lines.append(f"Skipped {result['skipped']} rows: {'; '.join(names)}{more}.")
    return "\n".join(lines)
