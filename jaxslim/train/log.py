"""What a run leaves to be read: metrics.jsonl (the truth), TensorBoard events (its mirror), a progress line.

    with Logger("runs/a", total_steps=1000) as log:
        log.write({"step": 10, "loss": 3.2, "lr/main": 1e-3, "audio_seconds": 412.0, "seconds": 31.5})

`audio_seconds` and `seconds` are given as counted since this process began; in the file they count from the first step
of the run, over resumes, so that curves against hours of audio need no sums. Only process 0 writes; elsewhere every
call does nothing. TensorFlow is not needed.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import struct
import time
import wave as wave_file
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

METRICS = "metrics.jsonl"
COUNTERS = ("audio_seconds", "seconds")
REWRITE = 30.0  # seconds between two uploads where a file cannot be appended to (object stores)
_log = logging.getLogger(__name__)


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl (or of the run folder that holds one), in order; [] if there is none.

    A last line cut short by a kill is left out. Raises ValueError that names any other broken line.
    """
    path = epath.Path(path)
    if path.name != METRICS and path.is_dir():
        path /= METRICS
    if not path.exists():
        return []
    lines, rows = path.read_text().split("\n"), []
    for i, line in enumerate(lines):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            if i == len(lines) - 1:
                break
            raise ValueError(f"{path} line {i + 1} is not JSON ({error}); it was not written by jaxslim.") from error
        if row is not None:
            rows.append(row)
    return rows


@contextlib.contextmanager
def process_log(folder: str | os.PathLike):
    """What this process logs, with times, also in folder/logs/process-NNNN.log (local folders only)."""
    if "://" in os.fspath(folder):
        yield
        return
    import jax

    path = epath.Path(folder) / "logs" / f"process-{jax.process_index():04d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger, before = logging.getLogger("jaxslim"), logging.getLogger("jaxslim").level
    logger.addHandler(handler)
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)
    try:
        yield
    except Exception as error:
        if isinstance(error, (ValueError, RuntimeError)) and type(error).__module__.startswith("jaxslim"):
            handler.handle(logger.makeRecord(logger.name, logging.WARNING, "", 0, f"The run ended: {error}", (), None))
        else:
            logger.exception("The run ended by a defect.")
        raise
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        handler.close()


class Logger:
    """Rows of numbers -> metrics.jsonl, TensorBoard and the terminal.

    Args:
      folder: of the run; local, or anything etils.epath opens (gs://).
      total_steps: for the progress bar and the time left.
      step: the last step that counts already; rows beyond it are dropped (0: the run starts anew).
      tensorboard: also write events to folder/tensorboard.
      console: show progress on stderr: a bar on a terminal, else a line every `every` steps.
      every: steps between two lines; by default total_steps / 20, at most 50.
      name: of the run or stage, shown before the progress.
      process: index of this process; by default jax.process_index().
    """

    def __init__(self, folder: str | os.PathLike, total_steps: int | None = None, *, step: int = 0,
                 tensorboard: bool = True, console: bool = True, every: int | None = None, name: str = "",
                 process: int | None = None):  # fmt: skip
        if process is None:
            import jax

            process = jax.process_index()
        self.folder, self.active = epath.Path(folder), process == 0
        self._file = self._events = self._console = None
        if not self.active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rows = [row for row in read(self.folder) if row.get("step", 0) <= step] if step else []
        self._before = {k: max((row.get(k) or 0.0 for row in self._rows), default=0.0) for k in COUNTERS}
        self._local = "://" not in os.fspath(folder)
        self._written = 0.0
        self._write_all()
        if self._local:
            self._file = open(self.folder / METRICS, "a", encoding="utf-8")
        if tensorboard:
            self._events = _open_events(self.folder / "tensorboard", step)
        if console:
            self._console = _Console(total_steps, step, every, name, self._before)

    def write(self, values: Mapping[str, Any]) -> None:
        """Appends one row: `step`, and numbers or 0-d arrays (fetched here); what is not finite is stored as null."""
        if not self.active:
            return
        row = {k: _number(v) for k, v in values.items()}
        row.update({k: round(row[k] + self._before[k], 3) for k in COUNTERS if row.get(k) is not None})
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        else:
            self._rows.append(row)
            if time.monotonic() - self._written > REWRITE:
                self._write_all()
        self._event(row["step"], [{"tag": k, "simple_value": v} for k, v in row.items()
                                  if k != "step" and isinstance(v, (int, float))])  # fmt: skip
        if self._console is not None:
            self._console.row(row)

    def tick(self, step: int) -> None:
        """Moves the progress bar; costs nothing and waits for no device."""
        if self._console is not None:
            self._console.tick(step)

    def note(self, message: str) -> None:
        """One line for the reader of the terminal, above the progress bar."""
        if self._console is not None:
            self._console.line(message)

    def text(self, step: int, tag: str, text: str) -> None:
        """A Markdown text in TensorBoard."""
        if self._events is not None:
            from tensorboard.plugins.text.summary_v2 import text_pb

            self._event(step, [value for value in text_pb(tag, text).value])

    def audio(self, step: int, tag: str, wave: np.ndarray, rate: int = 16000, text: str | None = None) -> None:
        """A clip (samples,), -1 to 1, in TensorBoard, with `text` (a hypothesis) beside it under tag/text."""
        if self._events is not None:
            clip = {"sample_rate": rate, "num_channels": 1, "length_frames": len(wave), "content_type": "audio/wav",
                    "encoded_audio_string": wav_bytes(wave, rate)}  # fmt: skip
            self._event(step, [{"tag": tag, "audio": clip}])
            if text is not None:
                self.text(step, f"{tag}/text", text)

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """An image in TensorBoard: (H, W) or (H, W, 3), uint8 or floats from 0 to 1."""
        if self._events is not None:
            png, (height, width) = _png(pixels), np.shape(pixels)[:2]
            self._event(step, [{"tag": tag, "image": {"height": height, "width": width, "colorspace": 3,
                                                      "encoded_image_string": png}}])  # fmt: skip

    def close(self) -> None:
        """Writes what is left and ends the progress bar; the logger is of no use afterwards."""
        if self._console is not None:
            self._console.close()
        if self._events is not None:
            self._events.close()
        if self._file is not None:
            self._file.close()
        elif self.active:
            self._write_all()
        self.active, self._file, self._events, self._console = False, None, None, None

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _write_all(self) -> None:
        part = self.folder / (METRICS + ".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
        part.replace(self.folder / METRICS)
        self._written = time.monotonic()

    def _event(self, step: int, values: list) -> None:
        if self._events is not None and values:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary

            values = [v if isinstance(v, Summary.Value) else Summary.Value(**v) for v in values]
            self._events.add_event(Event(wall_time=time.time(), step=int(step), summary=Summary(value=values)))


def wav_bytes(wave: np.ndarray, rate: int = 16000) -> bytes:
    """(samples,) floats from -1 to 1 -> a 16-bit mono WAV file."""
    out = io.BytesIO()
    with wave_file.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.rint(np.clip(wave, -1, 1) * 32767).astype("<i2").tobytes())
    return out.getvalue()


def _number(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _png(pixels: np.ndarray) -> bytes:
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8:
        pixels = np.rint(np.clip(np.nan_to_num(pixels), 0, 1) * 255).astype(np.uint8)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    height, width, _ = pixels.shape
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0)))  # each row led by its filter, 0 = none

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b"")


def _open_events(folder: epath.Path, step: int):
    """TensorBoard's own writer; None, with a warning, where it cannot write (an object store without its driver)."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    try:
        if not step and folder.exists():
            folder.rmtree()  # a run that starts anew: its old curves would lie under the new ones
        writer = EventFileWriter(os.fspath(folder), flush_secs=20)
    except Exception as error:  # of many kinds, by file system
        _log.warning("No TensorBoard events in %s (%s); %s is complete all the same.", folder, error, METRICS)
        return None
    if step:  # tells TensorBoard to drop what an earlier process wrote beyond `step`
        writer.add_event(Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START)))
    return writer


class _Console:
    """Progress on stderr: step, loss, audio hours per hour, time left."""

    def __init__(self, total: int | None, step: int, every: int | None, name: str, counters: Mapping[str, float]):
        from rich.console import Console

        self.total, self.first, self.start, self.shown = total, step, time.monotonic(), None
        self.every = every or max(1, min(50, (total or 1000) // 20))
        self.name, self.last, self.speed = name, counters, None
        self.out, self.bar = Console(stderr=True), None
        if self.out.is_terminal:
            from rich import progress as p

            columns = (p.TextColumn("{task.description}", markup=False), p.MofNCompleteColumn(), p.BarColumn(None),
                       p.TextColumn("{task.fields[info]}", markup=False), p.TimeElapsedColumn(), p.TextColumn("left"),
                       p.TimeRemainingColumn())  # fmt: skip
            self.bar = p.Progress(*columns, console=self.out)
            self.task = self.bar.add_task(name or "step", total=total, completed=step, info="compiling")
            self.bar.start()

    def row(self, row: Mapping[str, Any]) -> None:
        if row.get("seconds") and row.get("audio_seconds"):
            spent = row["seconds"] - self.last["seconds"]
            if spent > 0:
                self.speed = (row["audio_seconds"] - self.last["audio_seconds"]) / spent
            self.last = row
        shown = [(k, row[k]) for k in row if k == "loss" or k.split("/")[-1] == "wer"]
        info = [f"{k} {v:.4g}" for k, v in shown if isinstance(v, (int, float))]
        info += [f"{self.speed:.3g} h audio/h"] if self.speed else []
        due = self.shown is None or row["step"] >= self.shown + self.every or row["step"] == self.total
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], info="  ".join(info))
        elif due or "loss" not in row:  # validation always shows
            self.shown = row["step"]
            done, spent = row["step"] - self.first, time.monotonic() - self.start
            if self.total and 0 < done and row["step"] < self.total:
                info.append(f"{duration(spent / done * (self.total - row['step']))} left")
            of = f"/{self.total}" if self.total else ""
            self.line(f"{self.name + ': ' if self.name else ''}step {row['step']}{of}  " + "  ".join(info))

    def tick(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def line(self, message: str) -> None:
        self.out.print(message, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def duration(seconds: float) -> str:
    """75 -> '1 min 15 s', 4000 -> '1 h 07 min'; whole seconds below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
