"""The page of a whole run, of parts of a run, and of runs with hostile texts in them."""

import html.parser
import json
import math
import re

import numpy as np
import pytest

from jaxslim import svg
from jaxslim.clips import marked, save_clips
from jaxslim.data import Rows
from jaxslim.report import ReportError, console, report
from jaxslim.train.log import wav_bytes

TEXTS = [
    "please enter your password followed by the pound key",
    "the number you have dialed is not in service",
    "you are now the only person in this conference",
    "one moment please while i connect your call",
    "thank you for calling",
    "press five to record a message",
]


def damage(text: str, rate: float, seed: int) -> str:
    rng, words = np.random.default_rng(seed), []
    for word in text.split():
        kind = rng.random()
        if kind < rate / 4:
            continue
        words.append("".join(rng.permutation(list(word))) if kind < rate else word)
        words += ["uh"] if rng.random() < rate / 6 else []
    return " ".join(words)


def sound(seconds: float) -> np.ndarray:
    t = np.arange(round(16000 * seconds)) / 16000
    return 0.2 * np.sin(2 * np.pi * (200 + 80 * np.sin(6 * t)) * t)


def predictions(rate: float, seed: int, n: int = 70) -> list[dict]:
    from jaxslim.score import score

    texts = [TEXTS[i % len(TEXTS)] for i in range(n)]
    heard = [damage(text, rate, 1000 * seed + i) for i, text in enumerate(texts)]
    return [
        {
            "id": f"en/clip-{i}",
            "audio_filepath": f"{i}.opus",
            "duration": 2.0 + i % 5,
            "time": 0.1,
            "text": text,
            "pred_text": said,
            **counts,
        }
        for i, (text, said, counts) in enumerate(zip(texts, heard, score(texts, heard).utterances))
    ]


def pooled(rows) -> dict:
    from jaxslim.score import score

    found = score([r["text"] for r in rows], [r["pred_text"] for r in rows])
    return {k: found[k] for k in ("wer", "wer_low", "wer_high", "cer", "n")}


def build(folder, clips=True):
    """A run folder with plausible numbers: `jaxslim slim` on the bundled teacher."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {"teacher": predictions(0.14, 1), "control": predictions(0.13, 2), "student": predictions(0.17, 3)}
    for role, rows in said.items():
        (folder / f"predictions-{role}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    base = {
        "params": 7_032_000,
        "trained_params": 0,
        "gmacs": 4.62,
        "rtfx": 41.2,
        "seconds_per_second": 0.0243,
        "peak_bytes": 118e6,
    }
    slim = {
        "params": 7_163_000,
        "trained_params": 6_900_000,
        "gmacs": 4.31,
        "rtfx": 45.9,
        "seconds_per_second": 0.0218,
        "peak_bytes": 96e6,
        "frame_agreement": 0.943,
    }
    summary = {
        "version": "0.1.0",
        "recipe": "configs/linearize.yaml",
        "teacher": {"path": "bundled:wav2vec2-ctc-en", "fingerprint": "9f2c" * 16, **base, **pooled(said["teacher"])},
        "control": {
            "path": "control",
            "fingerprint": "77ab" * 16,
            **base,
            "trained_params": 7_000_000,
            **pooled(said["control"]),
        },
        "student": {"path": "final", "fingerprint": "01de" * 16, **slim, **pooled(said["student"])},
        "stages": [
            {"name": "align", "path": "01-align", "seconds": 94.0},
            {"name": "joint", "path": "02-joint", "seconds": 171.5},
        ],
        "environment": {"device": "cpu (2 cores)", "python": "3.11.7", "jax": "0.10.2", "flax": "0.12.8"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    rng = np.random.default_rng(0)
    for number, (name, steps) in enumerate((("align", 300), ("joint", 600)), 1):
        stage = folder / f"{number:02d}-{name}"
        stage.mkdir(exist_ok=True)
        info = {
            "name": name,
            "config": {"method": "linearize", "options": {"mixer": "hedgehog", "layers": "all"}, "parent": "9f2c" * 16},
            "params": [7_032_000, 7_163_000] if number == 1 else [7_163_000] * 2,
            "scores": {"wer": 0.31 - 0.08 * number},
        }
        (stage / "stage.json").write_text(json.dumps(info))
        rows = []
        for step in range(10, steps + 1, 10):
            fall = math.exp(-step / (steps / 4)) + 0.05
            terms = {
                f"loss/encoder.{i}" + (".attention" if name == "align" else ""): float(
                    fall * (0.2 + 0.08 * i) * rng.uniform(0.9, 1.1)
                )
                for i in range(8)
            }
            terms |= {"loss/ctc": float((0.3 + fall) * rng.uniform(0.8, 1.2))} if name == "joint" else {}
            rows.append(
                {
                    "step": step,
                    "loss": sum(terms.values()),
                    **terms,
                    "lr/main": 1e-3,
                    "grad_norm": 1.0,
                    "skipped": 0,
                    "audio_seconds": 36.0 * step,
                    "seconds": 0.3 * step,
                }
            )
            if name == "joint" and step % 100 == 0:
                rows.append({"step": step, "validation/wer": 0.2 + 0.5 * fall, "validation/cer": 0.08 + 0.2 * fall})
        (stage / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    speed = []
    for length in (1, 10, 30, 60, 300, 600):
        for model, engine, linear, square, memory in (
            ("bundled:wav2vec2-ctc-en", "jaxslim", 0.021, 5.5e-5, 8e6),
            ("bundled:wav2vec2-ctc-en", "torch sdpa", 0.026, 6.5e-5, 11e6),
            ("final", "jaxslim", 0.0215, 0, 7.6e6),
        ):
            steady = 0.004 + linear * length + square * length**2
            speed.append(
                {
                    "model": model,
                    "engine": engine,
                    "audio_seconds": length,
                    "batch": 1,
                    "dtype": "float32",
                    "compile_seconds": 3.1,
                    "first_seconds": 1.2 * steady,
                    "steady_seconds": steady,
                    "seconds_per_second": steady / length,
                    "peak_bytes": 3e7 + memory * length + 1.8e4 * (square > 0) * length**2,
                    "device": "cpu",
                    "threads": 2,
                    "versions": {"jax": "0.10.2"},
                }
            )
    (folder / "speed.json").write_text(json.dumps(speed))
    if clips:
        save_clips(
            folder,
            Rows([{"id": f"en/clip-{i}", "audio": wav_bytes(sound(2 + i % 5)), "text": "x"} for i in range(70)]),
            3,
        )
    return folder


class Page(html.parser.HTMLParser):
    """Checks nesting and collects what a browser would fetch or run."""

    VOID = {"meta", "br", "img", "input", "hr", "link"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.fetched, self.words = [], [], [], ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action") or k.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data.replace("\u00a0", " ")


def page_of(folder) -> tuple[Page, str]:
    with open(report(folder), encoding="utf-8") as file:
        text = file.read()
    return Page(text), text


def test_the_page_of_a_whole_run(tmp_path):
    page, text = page_of(build(tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for role in ("teacher", "control", "student"):
        m = summary[role]
        assert (
            f"{100 * m['wer']:.1f} %" in page.words
            and f"({100 * m['wer_low']:.1f}–{100 * m['wer_high']:.1f})" in page.words
        )
    assert "Student minus control:" in page.words and "Student minus teacher:" in page.words
    assert page.tags.count("audio") == 3 and text.count("data:audio/wav;base64,") == 3
    assert page.tags.count("figure") == 2 + 2 + 3  # speed; align: loss, layers; joint: loss, layers, validation
    assert "Loss by layer" in page.words and "teacher, PyTorch sdpa" in page.words
    assert "At 10 min of audio the student takes 12.9 s, the teacher 32.4 s" in page.words
    assert "0.10.2" in page.words
    assert "linearize · 1 min 34 s · 7.03 M → 7.16 M parameters · validation WER 23.0 %" in page.words


def test_nothing_is_fetched_or_run(tmp_path):
    page, text = page_of(build(tmp_path))
    assert all(value.startswith("data:") for value in page.fetched)
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text


def test_texts_are_escaped(tmp_path):
    build(tmp_path, clips=False)
    evil = '<script>alert("x")</script>'
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary |= {"recipe": evil, "environment": {evil: evil}}
    summary["student"]["path"] = f'"><b onclick={evil}'
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    clip = {"id": evil, "audio": None, "reference": f"a {evil} b", "teacher": f"a {evil} c", "student": "<i>"}
    (tmp_path / "clips.json").write_text(json.dumps([clip]))
    (tmp_path / "01-align" / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "loss": 1.0, f"loss/{evil}": 2.0}) + "\n"
    )
    page, _ = page_of(tmp_path)
    assert "script" not in page.tags and page.words.count("alert") >= 5 and not page.fetched


def test_missing_pieces_are_said(tmp_path):
    with pytest.raises(ReportError, match="holds no run"):
        report(tmp_path)
    model = {"path": "final", "wer": 0.25, "params": 1000}
    (tmp_path / "summary.json").write_text(json.dumps({"teacher": model, "student": {**model, "cer": None}}))
    page, _ = page_of(tmp_path)
    for words in (
        "no paired difference",
        "No speed.json",
        "neither clips nor predictions",
        "names no stages",
        "did not record",
    ):
        assert words in page.words
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ReportError, match="summary.json is not valid JSON"):
        report(tmp_path)


def test_a_training_run_without_summary_shows_its_curves(tmp_path):
    rows = [{"step": s, "loss": 3 / s, "loss/ctc": 3 / s, "lr/main": 1e-3} for s in range(1, 1001)]
    rows.append({"step": 1000, "loss": None, "validation/wer": 0.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    page, text = page_of(tmp_path)
    assert page.tags.count("figure") == 2 and "no comparison" in page.words and "Training" in page.words
    assert len(text) < 60_000  # curves are thinned


def test_console_table(tmp_path):
    from rich.console import Console

    out = Console(width=120, file=open(tmp_path / "out", "w"))
    build(tmp_path / "run")
    out.print(console(json.loads((tmp_path / "run" / "summary.json").read_text())))
    out.file.close()
    text = (tmp_path / "out").read_text().replace("\u00a0", " ")
    assert "Word error rate" in text and "7.03 M" in text and "−10 %" in text and "points" in text
    assert console({"teacher": {"wer": 0.5}}).columns[-1].header == "teacher"


def test_clips_are_those_that_tell(tmp_path):
    build(tmp_path)
    clips = json.loads((tmp_path / "clips.json").read_text())
    assert len(clips) == 3 and all(c["teacher"] != c["student"] and c["reference"] in TEXTS for c in clips)
    assert all((tmp_path / c["audio"]).stat().st_size > 30_000 for c in clips)


@pytest.mark.parametrize(
    "hypothesis, html, count",
    [
        ("a b c", "a b c", "no errors"),
        ("a x c", 'a <mark class="wrong" title="instead of: b">x</mark> c', "1 of 3 words wrong"),
        ("a c", 'a <mark class="missing" title="missing">b</mark> c', "1 of 3 words wrong"),
        ("a b <c> c", 'a b <mark class="extra" title="extra">&lt;c&gt;</mark> c', "1 of 3 words wrong"),
        (
            "",
            "".join(f'{" " * (w != "a")}<mark class="missing" title="missing">{w}</mark>' for w in "abc"),
            "3 of 3 words wrong",
        ),
    ],
)
def test_marked_transcripts(hypothesis, html, count):
    assert marked("a b c", hypothesis) == (html, count)
    assert marked("", "")[1] == "no errors"


@pytest.mark.parametrize(
    "low, high, log",
    [
        (0, 1, False),
        (-3, 12345, False),
        (5, 5, False),
        (0, 0, False),
        (1e-4, 3, True),
        (2.1, 2.9, True),
        (7, 7, True),
        (1e-9, 1e9, True),
    ],
)
def test_axes_have_a_few_round_ticks_inside(low, high, log):
    axis = svg._Axis([low, high], log, 0, 100, 0.05)
    ticks = axis.ticks(5)
    assert 2 <= len(ticks) <= 7 and all(-1e-6 <= axis(t) <= 100 + 1e-6 for t in ticks)
    assert 0 <= axis(low) <= axis(high) <= 100
    assert len({svg.number(t) for t in ticks}) == len(ticks)


def test_charts_leave_out_what_cannot_be_drawn():
    nothing = svg.chart([svg.Series("a", [(1, math.nan), (2, None)])], label="", xlabel="")
    assert nothing == "" and svg.chart([svg.Series("a", [(0, -1)])], label="", xlabel="", ylog=True) == ""
    many = svg.chart([svg.Series("a", [(i, i) for i in range(10_000)])], label="", xlabel="")
    assert many.count(",") < 400
