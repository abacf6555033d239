"""Two systems on the same utterances: what the difference is, whether it is resolved, and who pays for it.

Read from predictions files (`jaxslim eval --predictions`, or those of a run folder); nothing is run again.
"""
from __future__ import annotations

import collections
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from jaxslim import score

Row = Mapping[str, Any]
LENGTHS = (2.0, 5.0, 10.0, 20.0)  # seconds: ends of the slices by duration
FEW = 5                           # utterances below which a slice has no interval


def read(source: str | os.PathLike, role: str = "student") -> list[Row]:
    """Rows of a predictions file, or of `predictions-ROLE.jsonl` in a run folder.

    Raises:
      ValueError: there is none, it is not JSON lines, or rows lack text or pred_text.
    """
    path = epath.Path(source)
    if path.is_dir():
        names = [path / f"predictions-{role}.jsonl", path / "predictions.jsonl"]
        path = next((p for p in names if p.exists()), names[0])
    if not path.exists():
        raise ValueError(f"{path} does not exist; write it with `jaxslim eval MODEL --data DATA --predictions FILE`.")
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} is no predictions file: {error}.") from error
    if not rows or not all(isinstance(r, dict) and "text" in r and "pred_text" in r for r in rows):
        raise ValueError(f"{path} is no predictions file: rows need text and pred_text.")
    return rows


def compare(a: Sequence[Row], b: Sequence[Row], by: Sequence[str] = ("duration",),
            normalize: str = "none") -> dict[str, Any]:
    """System a minus system b, on the utterances that both have.

    Args:
      by: columns of the rows to slice by; `duration` is cut at 2, 5, 10 and 20 s.
    Returns:
      n, only_a, only_b (utterances that one of them lacks); a, b (dicts of wer, cer, substitutions, deletions,
      insertions); delta, low, high (paired 95 % interval of the WER), upper (upper end of the 90 % interval); slices
      (list of column, value, n, words, wer_a, wer_b, delta, low, high); confusions (list of heard-by-a, said, count:
      words that a gets wrong and b right); changed (rows whose transcripts differ, those that lost most first).
    Raises:
      ValueError: no utterance in common, or the same utterance with two references.
    """
    a, b = ({_name(row): row for row in rows} for rows in (a, b))
    names = [name for name in a if name in b]
    if not names:
        raise ValueError("The two predictions have no utterance in common: are they of the same data?")
    for name in names:
        if a[name]["text"] != b[name]["text"]:
            raise ValueError(f"{name} has two references, {a[name]['text']!r} and {b[name]['text']!r}: is it the same "
                             "data?")
    texts = [a[name]["text"] for name in names]
    sides = [score.score(texts, [rows[name]["pred_text"] for name in names], normalize) for rows in (a, b)]
    keys = ("wer", "wer_low", "wer_high", "cer", "words", "substitutions", "deletions", "insertions")
    counts = {name: (x["errors"], y["errors"], x["words"])
              for name, x, y in zip(names, sides[0].utterances, sides[1].utterances)}
    return {"n": len(names), "only_a": len(a) - len(names), "only_b": len(b) - len(names), "normalize": normalize,
            "a": {k: sides[0][k] for k in keys}, "b": {k: sides[1][k] for k in keys}, **_paired(counts.values(), 0),
            "slices": [row for column in by for row in _slices(column, names, a, counts)],
            "confusions": _confusions(texts, [[rows[n]["pred_text"] for n in names] for rows in (a, b)], normalize),
            "changed": _changed(names, a, b, counts)}


def paired(a: Sequence[Row], b: Sequence[Row]) -> dict[str, float] | None:
    """The difference alone: n, delta, low, high, upper as in `compare`; None without a word in common.

    Counts that are in the rows are taken as they are, so that a run's own scores are what is compared.
    """
    a, b = ({_name(row): row for row in rows} for rows in (a, b))
    sides = [[rows[name] for name in a if name in b] for rows in (a, b)]
    if not all("errors" in row and "words" in row for side in sides for row in side):
        sides = [score.score([r["text"] for r in side], [r["pred_text"] for r in side]).utterances for side in sides]
    counts = [(x["errors"], y["errors"], x["words"]) for x, y in zip(*sides)]
    return {"n": len(counts), **_paired(counts, 0)} if sum(c[2] for c in counts) else None


def _name(row: Row) -> str:
    return str(row.get("id", row.get("audio_filepath")))


def _paired(counts, fewest: int = FEW) -> dict[str, float | None]:
    """Difference of the pooled WER and its intervals; None where there are too few utterances, or no words."""
    first, second, words = (list(column) for column in zip(*counts))
    if not sum(words) or len(words) < fewest:
        delta = (sum(first) - sum(second)) / sum(words) if sum(words) else None
        return {"delta": delta, "low": None, "high": None, "upper": None}
    delta, low, high = score.paired_bootstrap(first, second, words)
    return {"delta": delta, "low": low, "high": high,
            "upper": score.paired_bootstrap(first, second, words, level=0.90)[2]}


def _slices(column: str, names, rows, counts) -> list[dict[str, Any]]:
    groups = collections.defaultdict(list)
    for name in names:
        value = rows[name].get(column)
        groups[_length(value) if column == "duration" else str(value)].append(name)
    if set(groups) == {"None"}:
        raise ValueError(f"The predictions have no column {column!r}; they have {', '.join(rows[names[0]])}.")
    found = []
    for value, members in sorted(groups.items()):
        words = sum(counts[name][2] for name in members)
        wer = lambda side: sum(counts[n][side] for n in members) / words if words else None  # noqa: B023, E731
        found.append({"column": column, "value": value, "n": len(members), "words": words, "wer_a": wer(0),
                      "wer_b": wer(1), **_paired([counts[name] for name in members])})
    return found


def _length(seconds: float | None) -> str:
    if seconds is None:
        return "None"
    ends = (0.0, *LENGTHS)
    k = sum(seconds >= end for end in ends) - 1
    return f"{ends[k]:02g} to {ends[k + 1]:02g} s" if k + 1 < len(ends) else f"{ends[k]:02g} s and more"


def _confusions(references, sides, normalize: str, most: int = 20) -> list[tuple[str, str, int]]:
    """Words of the references that a misses and b has: (what a heard, what was said, how often)."""
    import jiwer

    clean = score.NORMALIZERS[normalize]
    references, *sides = ([" ".join(clean(t).split()) for t in texts] for texts in (references, *sides))
    kept = [i for i, text in enumerate(references) if text]
    first, second = (jiwer.process_words([references[i] for i in kept], [side[i] for i in kept]) for side in sides)
    found = collections.Counter()
    for x, y in zip(range(len(kept)), second.alignments):
        right = {k for c in y if c.type == "equal" for k in range(c.ref_start_idx, c.ref_end_idx)}
        for c in first.alignments[x]:
            for k in range(c.ref_start_idx, c.ref_end_idx) if c.type in ("substitute", "delete") else ():
                heard = first.hypotheses[x][c.hyp_start_idx + k - c.ref_start_idx] if c.type == "substitute" else ""
                if k in right:
                    found[heard, first.references[x][k]] += 1
    return [(heard, said, n) for (heard, said), n in found.most_common(most)]


def _changed(names, a, b, counts) -> list[dict[str, Any]]:
    """For people to listen to: transcripts that differ; a negative gain is a loss."""
    rows = [{"id": name, "audio_filepath": a[name].get("audio_filepath"), "duration": a[name].get("duration"),
             "text": a[name]["text"], "a": a[name]["pred_text"], "b": b[name]["pred_text"],
             "gain": counts[name][1] - counts[name][0]}
            for name in names if a[name]["pred_text"] != b[name]["pred_text"]]
    return sorted(rows, key=lambda row: row["gain"])


def verdict(result: Mapping[str, Any]) -> str:
    """Better, worse or not resolved, by the paired 95 % interval."""
    if result["low"] is None:
        return "not resolved"
    return "worse" if result["low"] > 0 else "better" if result["high"] < 0 else "not resolved"


def render(result: Mapping[str, Any], names: tuple[str, str] = ("A", "B")) -> str:
    percent = lambda x: "-" if x is None else f"{100 * x:.1f}"  # noqa: E731
    points = lambda x: "-" if x is None else f"{100 * x:+.1f}"  # noqa: E731
    lines = [f"{result['n']} utterances in both" + "".join(f", {result[k]} only in {n}" for k, n in
                                                           zip(("only_a", "only_b"), names) if result[k])]
    for key, name in zip("ab", names):
        s = result[key]
        lines.append(f"{name}: WER {percent(s['wer'])} % ({percent(s['wer_low'])} to {percent(s['wer_high'])}), CER "
                     f"{percent(s['cer'])} %, {s['substitutions']} S {s['deletions']} D {s['insertions']} I")
    lines.append(f"{names[0]} minus {names[1]}: {points(result['delta'])} points of WER, 95 % {points(result['low'])} "
                 f"to {points(result['high'])}, 90 % up to {points(result['upper'])}: {verdict(result)}")
    for row in result["slices"]:
        lines.append(f"  {row['column']} {row['value']}: {row['n']} utterances, {percent(row['wer_a'])} % against "
                     f"{percent(row['wer_b'])} %, {points(row['delta'])} ({points(row['low'])} to "
                     f"{points(row['high'])})")
    if result["confusions"]:
        shown = (f"{said} -> {heard or '(nothing)'} {n}x" for heard, said, n in result["confusions"][:8])
        lines.append(f"{names[0]} alone gets wrong: {', '.join(shown)}")
    lines.append(f"{len(result['changed'])} transcripts differ")
    return "\n".join(lines)


def gates(result: Mapping[str, Any], rows: Sequence[Row], max_wer: float | None = None,
          baseline: str | None = None, max_regression: float = 0.0) -> list[str]:
    """Sentences of the gates that are missed, for CI.

    Args:
      result, rows: of `evaluate`: scores, and the rows of its predictions.
      max_wer: fraction that the WER may not exceed.
      baseline: predictions file or run folder; missed when the lower end of the paired 95 % interval of (this minus
        baseline) exceeds `max_regression` (a fraction): when the loss is resolved.
    """
    missed = []
    if max_wer is not None and (result.get("wer") is None or result["wer"] > max_wer):
        said = "no reference words" if result.get("wer") is None else f"WER {100 * result['wer']:.1f} %"
        missed.append(f"{said}, more than {100 * max_wer:g} % allows.")
    if baseline is not None:
        paired = compare(rows, read(baseline), by=())
        if paired["low"] is not None and paired["low"] > max_regression:
            missed.append(f"WER is {100 * paired['delta']:+.1f} points from {baseline}, at least "
                          f"{100 * paired['low']:+.1f} (95 %), more than {100 * max_regression:g} allow.")
    return missed
