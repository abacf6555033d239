"""Accuracy of a classifier of clips or texts, with its interval."""

from __future__ import annotations

import jax
import numpy as np

from jaxslim.data import DataError, TextBatches, TextTask
from jaxslim.decode import Greedy
from jaxslim.evaluate import batches_of
from jaxslim.score import Result, bootstrap


def classify(model, rows, task, batch_size: int = 8, dtype=None, max_skipped: float = 0.05, predictions=None,
             mesh=None, batch_seconds=None, buckets=None) -> Result:
    """Accuracy of `model` on Rows with a column `label` and audio or `text`; arguments as `evaluate.evaluate`.

    Returns:
      accuracy, accuracy_low, accuracy_high (95 % bootstrap over rows) as fractions, n, errors, tokens of texts or
      audio_seconds of clips, seconds (forward passes; compiling not included), compile_seconds, skipped. `predictions`
      gets id, input (a text, or the path of a clip), and as transcripts text (the class), pred_text, errors.
    """
    forward, texts = Greedy(model, mesh, dtype), isinstance(task, TextTask)
    if texts:
        batches = TextBatches(rows, task, batch_size=batch_size, multiple_of=forward.multiple, shuffle=False, epochs=1,
                              max_skipped=max_skipped)
    else:
        batches, _ = batches_of(rows, task, forward, batch_size, batch_seconds, buckets, max_skipped)
    found, spent, length, labels = {}, 0.0, 0, rows.column("label")
    for batch in batches:
        if texts:
            del batch["labels"]
            batch["samples"] = batch["attention_mask"].sum(-1).astype(np.int32)  # of a text: its tokens
        out, took = forward(batch)
        spent += took
        for row, said, size in zip(out["row"], out["ids"], out["samples"]):
            if row >= 0:
                found[int(row)], length = int(said), length + int(size)
    skipped, ids, known = list(batches.skipped), rows.column("id"), {}
    for i in sorted(found):
        try:
            known[i] = task.label(labels[i])
        except DataError as error:
            skipped.append((ids[i], str(error)))
    if len(skipped) > max_skipped * len(rows) or not known:
        raise DataError(f"{rows.name}: {len(known)} of {len(rows)} rows can be scored, fewer than max_skipped = "
                        f"{max_skipped:g} allows" + (f" ({skipped[0][0]}: {skipped[0][1]})." if skipped else "."))
    wrong = [found[i] != label for i, label in known.items()]
    low, high = bootstrap(wrong, [1] * len(wrong))
    result = Result(accuracy=1 - float(np.mean(wrong)), accuracy_low=1 - high, accuracy_high=1 - low, n=len(wrong),
                    errors=int(sum(wrong)), seconds=spent, compile_seconds=forward.compile_seconds,
                    skipped=len(skipped))
    result |= {"tokens": length} if texts else {"audio_seconds": length / task.sampling_rate}
    result.skipped_rows, inputs = skipped, rows.column("text" if texts else "audio")
    result.utterances = [
        {"id": ids[i], "input": inputs[i] if texts else (inputs[i] or {}).get("path") or ids[i],
         "text": task.decode(label), "pred_text": task.decode(found[i]), "errors": int(found[i] != label), "words": 1}
        for i, label in known.items()]
    if predictions is not None and jax.process_index() == 0:
        result.write(predictions)
    return result


def render(result: Result) -> str:
    """What `classify` returned, in a few lines for the terminal."""
    what, size = ("texts", f"{result['tokens']} tokens") if "tokens" in result else (
        "clips", f"{result['audio_seconds']:.1f} s of audio")
    lines = [f"Accuracy {100 * result['accuracy']:.1f} % (95 % interval {100 * result['accuracy_low']:.1f} to "
             f"{100 * result['accuracy_high']:.1f}): {result['errors']} of {result['n']} {what} wrong",
             f"{size} in {result['seconds']:.1f} s (compiling took another "
             f"{result['compile_seconds']:.1f} s)"]
    if result["skipped"]:
        names = [f"{name}: {reason.rstrip('.')}" for name, reason in result.skipped_rows[:3]]
        lines.append(f"Skipped {result['skipped']} rows: {'; '.join(names)}.")
    return "\n".join(lines)
