"""Characters (a linear, CTC; for SUPERB's phone recognition) and speech recognition (BiLSTM, CTC), on sentences."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from flax import nnx

from jaxslim.data import CTCTask
from jaxslim.data.store import plan
from jaxslim.score import score
from jaxslim.superb.clips import find
from jaxslim.superb.features import Features
from jaxslim.superb.heads import Batch, BiLSTM, Head, Linear, fit
from jaxslim.superb.tasks import Arrays, Options, Task
from jaxslim.train import losses

LETTERS = "abcdefghijklmnopqrstuvwxyz'"
TEXT = CTCTask({t: i for i, t in enumerate(["<pad>", "|", *LETTERS])})


def ctc(outputs, batch):
    term, _ = losses.ctc(outputs, frames(outputs, batch), batch["labels"], TEXT.blank_id)
    return term.sum / term.count


def frames(outputs, batch):
    """Valid frames of the outputs, which may be fewer than the states'."""
    return -(-batch["lengths"] // -(-batch["states"].shape[2] // outputs.shape[1]))


def batches(features: Features, index: list[int], seconds: float, rng: np.random.Generator | None) -> Iterator[Batch]:
    """Clips of about one length in shapes (B, L, T, D); in random order with `rng`. Rows that fill the last batch of a
    shape have no label, and `row` -1."""
    clips = features.clips
    rate = max(features.states(i).shape[1] / clips[i].seconds for i in index)   # frames a second
    order = index if rng is None else rng.permutation(index)
    shards = plan({int(i): clips[i].seconds for i in order}, seconds)
    widths = {end: max(len(clips[i].text) for m, _, e in shards if e == end for i in m) for _, _, end in shards}
    out = [(np.array(members), size, int(np.ceil(end * rate)) + 1, widths[end]) for members, size, end in shards]
    for k in range(len(out)) if rng is None else rng.permutation(len(out)):
        yield _batch(features, *out[k])


def _batch(features: Features, members: np.ndarray, size: int, frames: int, width: int) -> Batch:
    states = np.zeros((size, features.layers, frames, features.width), np.float16)
    lengths, rows = np.ones(size, np.int32), np.full(size, -1, np.int32)
    for b, i in enumerate(members):
        x = features.states(i)
        states[b, :, : x.shape[1]], lengths[b], rows[b] = x, x.shape[1], i
    labels = [TEXT.encode(features.clips[i].text) for i in members]
    labels += [()] * (size - len(members))
    return {"states": states, "lengths": lengths, "row": rows, **TEXT.targets(labels, width)}


def recognize(features: Features, o: Options, head, steps: int, rate: float) -> tuple[Arrays, dict]:
    """Trains a head for each seed and scores the test sentences with greedy decoding."""
    train, test = (find(features.clips, "sentence", split) for split in ("train", "test"))
    words, errors, letters, wrong, shares = [], [], [], [], []
    for seed in o.seeds:
        run, share = fit(Head(features.layers, head(nnx.Rngs(seed))), ctc,
                         lambda rng: _inputs(batches(features, train, o.batch_seconds, rng)), steps, rate, seed)
        said = {}
        for batch in batches(features, test, o.batch_seconds, None):
            outputs = run({k: batch[k] for k in ("states", "lengths")})
            ids, lengths = outputs.argmax(-1), frames(outputs, batch)
            said |= {int(i): TEXT.transcript(ids[b, : lengths[b]]) for b, i in enumerate(batch["row"]) if i >= 0}
        found = score([features.clips[i].text for i in test], [said[i] for i in test]).utterances
        words, letters = [u["words"] for u in found], [u["characters"] for u in found]
        errors.append([u["errors"] for u in found])
        wrong.append([u["character_errors"] for u in found])
        shares.append(share)
    arrays = {"words": np.array(words), "errors": np.array(errors), "characters": np.array(letters),
              "character_errors": np.array(wrong)}
    return arrays, {"layer_weights": np.mean(shares, 0).round(4).tolist(), "train_clips": len(train),
                    "test_clips": len(test)}


def _inputs(stream: Iterator[Batch]) -> Iterator[Batch]:
    return ({k: v for k, v in batch.items() if k != "row"} for batch in stream)


def rate_of(errors: str, units: str):
    return lambda a, rows: float(a[errors][:, rows].sum() / (len(a[errors]) * a[units][rows].sum()))


def characters(features: Features, o: Options):
    return recognize(features, o, lambda rngs: Linear(features.width, len(TEXT.vocabulary), rngs), o.char_steps,
                     o.char_rate)


def speech(features: Features, o: Options):
    return recognize(features, o, lambda rngs: BiLSTM(features.width, len(TEXT.vocabulary), o.asr_units, o.asr_layers,
                                                      o.asr_stack, rngs), o.asr_steps, o.asr_rate)


COUNT = lambda a: len(a["words"])  # noqa: E731
CHAR = Task("char", "CER", "lower", characters, COUNT, rate_of("character_errors", "characters"), 1.0)
ASR = Task("asr", "WER", "lower", speech, COUNT, rate_of("errors", "words"), 1.0)
