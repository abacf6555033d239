"""Accuracy of a text classifier, with its interval."""

from __future__ import annotations

import json

import jax
import numpy as np
from etils import epath

from jaxslim.data import DataError, TextBatches
from jaxslim.decode import Greedy
from jaxslim.score import Result, bootstrap


def classify(model, rows, task, batch_size: int = 8, dtype=None, max_skipped: float = 0.05, predictions=None,
             mesh=None) -> Result:
    """Accuracy of `model` on Rows with columns `text` and `label`; arguments as `evaluate.evaluate`.

    Returns:
      accuracy, accuracy_low, accuracy_high (95 % bootstrap over rows) as fractions, n, errors, tokens, seconds (forward
      passes; compiling not included), compile_seconds, skipped. `predictions` gets id, input, and as transcripts text
      (the class), pred_text, errors.
    """
    forward = Greedy(model, mesh, dtype)
    batches = TextBatches(rows, task, batch_size=batch_size, multiple_of=forward.multiple, shuffle=False, epochs=1,
                          max_skipped=max_skipped)
    found, spent, tokens = {}, 0.0, 0
    for batch in batches:
        labels = batch.pop("labels")
        batch["samples"] = batch["attention_mask"].sum(-1).astype(np.int32)  # of a text: its tokens
        out, took = forward(batch)
        spent += took
        for row, said, label, length in zip(out["row"], out["ids"], labels, out["samples"]):
            if row >= 0:
                found[int(row)], tokens = (int(said), int(label)), tokens + int(length)
    if not found:
        raise DataError(f"{rows.name} has no row with text and label to score.")
    wrong = [said != label for _, (said, label) in sorted(found.items())]
    low, high = bootstrap(wrong, [1] * len(wrong))
    result = Result(accuracy=1 - float(np.mean(wrong)), accuracy_low=1 - high, accuracy_high=1 - low, n=len(wrong),
                    errors=int(sum(wrong)), tokens=tokens, seconds=spent, compile_seconds=forward.compile_seconds,
                    skipped=len(batches.skipped))
    result.skipped_rows, ids, texts = batches.skipped, rows.column("id"), rows.column("text")
    result.utterances = [
        {"id": ids[i], "input": texts[i], "text": task.decode(label), "pred_text": task.decode(said),
         "errors": int(said != label), "words": 1} for i, (said, label) in sorted(found.items())]
    if predictions is not None and jax.process_index() == 0:
        path = epath.Path(predictions)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.utterances))
    return result


def render(result: Result) -> str:
    """What `classify` returned, in a few lines for the terminal."""
    lines = [f"Accuracy {100 * result['accuracy']:.1f} % (95 % interval {100 * result['accuracy_low']:.1f} to "
             f"{100 * result['accuracy_high']:.1f}): {result['errors']} of {result['n']} texts wrong",
             f"{result['tokens']} tokens in {result['seconds']:.1f} s (compiling took another "
             f"{result['compile_seconds']:.1f} s)"]
    if result["skipped"]:
        names = [f"{name}: {reason.rstrip('.')}" for name, reason in result.skipped_rows[:3]]
        lines.append(f"Skipped {result['skipped']} rows: {'; '.join(names)}.")
    return "\n".join(lines)
