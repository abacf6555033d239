"""Bits per character of a language model, with its interval."""

from __future__ import annotations

import functools
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxslim.data import DataError
from jaxslim.data.language import TokenBatches
from jaxslim.score import Result, bootstrap, paired_bootstrap
from jaxslim.slim import Slim, inputs
from jaxslim.train import losses
from jaxslim.train import mesh as meshes


@functools.partial(jax.jit, static_argnames="dtype")
def _nats(model: Slim, batch, dtype: str | None):
    """-log p of every label (B, T), 0 where there is none; and whether it was the most probable token."""
    logits = model(dtype=dtype, **inputs(batch, model)).logits
    labels = batch["labels"]
    valid = labels != losses.IGNORE
    logs = jnp.take_along_axis(jax.nn.log_softmax(logits, -1), jnp.where(valid, labels, 0)[..., None], -1)[..., 0]
    return jnp.where(valid, -logs, 0.0), (logits.argmax(-1) == labels) & valid


def bits(model: Slim, rows, task, batch_size: int = 8, dtype=None, max_skipped: float = 0.05, predictions=None,
         mesh=None, length: int | None = None) -> Result:
    """Bits per character of `model` on Rows with a column `text`; arguments as `evaluate.evaluate`.

    The texts are read as in training: joined by end tokens and cut into rows of `length` tokens (default: the task's),
    each row by itself. The end of a text is predicted too and counts as one character.

    Returns:
      bits_per_character, bits_per_character_low, bits_per_character_high (95 % bootstrap over texts), perplexity (of a
      token), accuracy_of_tokens, n (texts), characters, tokens, context (tokens of a row), seconds (forward passes;
      compiling not included), compile_seconds, skipped. `predictions` gets id, text, bits, characters of every text.
    """
    multiple = 1 if mesh is None else meshes.shards(mesh)
    batches = TokenBatches(rows, task, length=length, batch_size=batch_size, multiple_of=multiple, shuffle=False,
                           epochs=1, max_skipped=max_skipped)
    model = model.replace(params=jax.device_put(model.params) if mesh is None else meshes.place(model.params, mesh))
    nats, right, spent, compiled, run = [], 0, 0.0, 0.0, None
    dtype = None if dtype is None else jnp.dtype(dtype).name
    for batch in batches:
        valid = batch["labels"] != losses.IGNORE
        batch = {k: v for k, v in batch.items() if k != "row"}
        batch = batch if mesh is None else meshes.batch(batch, mesh)
        start = time.perf_counter()
        if run is None:  # all batches have one shape
            run = _nats.lower(model, batch, dtype).compile()
            compiled, start = time.perf_counter() - start, time.perf_counter()
        values, hits = jax.device_get(run(model, batch))
        spent += time.perf_counter() - start
        nats.append(values[valid])
        right += int(hits.sum())
    nats, owners, texts = np.concatenate(nats), batches.owners, rows.column("text")
    total = np.bincount(owners, nats.astype(np.float64), minlength=len(rows)) / math.log(2)
    used = np.unique(owners)
    bits_, characters = total[used], np.array([len(texts[i]) + 1 for i in used])
    if not len(used):
        raise DataError(f"{rows.name} has no row with text to score.")
    low, high = bootstrap(bits_.tolist(), characters.tolist())
    result = Result(bits_per_character=float(bits_.sum() / characters.sum()), bits_per_character_low=low,
                    bits_per_character_high=high, perplexity=float(np.exp(nats.mean(dtype=np.float64))),
                    accuracy_of_tokens=right / len(nats), n=len(used), characters=int(characters.sum()),
                    tokens=len(nats), context=batches.length, seconds=spent, compile_seconds=compiled,
                    skipped=len(batches.skipped))
    ids, result.skipped_rows = rows.column("id"), batches.skipped
    result.utterances = [{"id": ids[i], "text": texts[i], "bits": round(float(b), 4), "characters": int(n)}
                         for i, b, n in zip(used, bits_, characters)]
    if predictions is not None and jax.process_index() == 0:
        result.write(predictions)
    return result


def paired(folder, a: str, b: str) -> dict[str, float]:
    """Bits per character of role `a` less those of `b` in a run folder, over the texts that both have, with the 95 %
    bootstrap interval: n, delta, low, high."""
    sides = []
    for role in (a, b):
        rows = map(json.loads, (epath.Path(folder) / f"bits-{role}.jsonl").read_text().splitlines())
        sides.append({row["id"]: row for row in rows})
    names = [name for name in sides[0] if name in sides[1]]
    delta, low, high = paired_bootstrap(*([side[n]["bits"] for n in names] for side in sides),
                                        [sides[0][n]["characters"] for n in names])
    return {"n": len(names), "delta": delta, "low": low, "high": high}


def render(result: Result) -> str:
    """What `bits` returned, in a few lines for the terminal."""
    lines = [f"{result['bits_per_character']:.4f} bits per character (95 % interval "
             f"{result['bits_per_character_low']:.4f} to {result['bits_per_character_high']:.4f}), perplexity of a "
             f"token {result['perplexity']:.3f}",
             f"{result['n']} texts, {result['characters']} characters, {result['tokens']} tokens in rows of "
             f"{result['context']}: {result['seconds']:.1f} s (compiling took another "
             f"{result['compile_seconds']:.1f} s)"]
    if result["skipped"]:
        lines.append(f"Skipped {result['skipped']} rows.")
    return "\n".join(lines)
