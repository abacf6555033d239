"""metrics.jsonl, TensorBoard events without TensorFlow, the progress lines."""

import io
import json
import subprocess
import sys
import wave

import jax.numpy as jnp
import numpy as np
import pytest

from jaxslim.train import log
from jaxslim.train.log import Logger


def rows(first, last):
    return [{"step": s, "loss": 1 / s, "loss/ctc": jnp.float32(2), "audio_seconds": 10.0 * (s - first + 1),
             "seconds": 2.0 * (s - first + 1)} for s in range(first, last + 1)]  # fmt: skip


def write(folder, first, last, **kwargs):
    with Logger(folder, total_steps=20, console=False, **kwargs) as logger:
        for row in rows(first, last):
            logger.write(row)


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sizes = dict.fromkeys(("images", "audio", "tensors", "scalars"), 0)
    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance=sizes)
    accumulator.Reload()
    return accumulator


def test_rows_are_flushed_as_they_come_and_read_back(tmp_path):
    logger = Logger(tmp_path, console=False, tensorboard=False)
    logger.write({"step": 1, "loss": np.float32(0.5), "skipped": jnp.int32(3), "lr/main": 1e-3})
    assert log.read(tmp_path) == [{"step": 1, "loss": 0.5, "skipped": 3, "lr/main": 1e-3}]
    assert log.read(tmp_path / "metrics.jsonl") == log.read(tmp_path)
    logger.write({"step": 2, "loss": float("nan")})
    assert log.read(tmp_path)[-1] == {"step": 2, "loss": None}
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    logger.close()


def test_resume_drops_rows_beyond_the_step(tmp_path):
    write(tmp_path, 1, 6)
    write(tmp_path, 5, 8, step=4)
    assert [r["step"] for r in log.read(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [r["seconds"] for r in log.read(tmp_path)] == [2, 4, 6, 8, 10, 12, 14, 16]  # counted over the resume
    assert [e.step for e in events(tmp_path).Scalars("loss")] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_run_that_starts_anew_leaves_nothing_of_the_old_one(tmp_path):
    write(tmp_path, 1, 6)
    write(tmp_path, 1, 2)
    assert [r["step"] for r in log.read(tmp_path)] == [1, 2]
    assert len(events(tmp_path).Scalars("loss")) == 2


def test_read_forgives_a_cut_last_line_only(tmp_path):
    assert log.read(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert log.read(tmp_path) == [{"step": 1}]
    write(tmp_path, 2, 3, step=1)  # resuming mends it
    assert [r["step"] for r in log.read(tmp_path)] == [1, 2, 3]
    (tmp_path / "metrics.jsonl").write_text('{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1"):
        log.read(tmp_path)


def test_other_processes_write_nothing(tmp_path):
    with Logger(tmp_path / "run", process=1) as logger:
        logger.write({"step": 1, "loss": 1.0})
        logger.tick(1)
        logger.note("hello")
        logger.audio(1, "clip", np.zeros(10))
    assert not (tmp_path / "run").exists()


def test_tensorboard_audio_text_and_image(tmp_path):
    sound = np.sin(np.arange(800) / 10)
    with Logger(tmp_path, console=False) as logger:
        logger.audio(3, "clip/0", sound, 16000, text="hello wörld")
        logger.image(3, "attention", np.eye(4))
        logger.image(4, "colours", np.zeros((2, 5, 3), np.uint8))
    found = events(tmp_path)
    clip = found.Audio("clip/0")[0]
    with wave.open(io.BytesIO(clip.encoded_audio_string)) as file:
        assert (file.getframerate(), file.getnframes(), file.getnchannels()) == (16000, 800, 1)
        back = np.frombuffer(file.readframes(800), "<i2") / 32767
    assert np.abs(back - sound).max() < 1e-4
    assert found.Tensors("clip/0/text")[0].tensor_proto.string_val[0].decode() == "hello wörld"
    assert (found.Images("colours")[0].width, found.Images("colours")[0].height) == (5, 2)
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(found.Images("attention")[0].encoded_image_string))
    assert (np.asarray(image)[:, :, 0] == 255 * np.eye(4)).all()


def test_neither_tensorflow_nor_torch_is_imported(tmp_path):
    code = ("import sys; from jaxslim.train.log import Logger; l = Logger(sys.argv[1], console=False); "
            "l.write({'step': 1, 'loss': 1.0}); l.text(1, 'a', 'b'); l.close(); "
            "sys.exit(bool({'tensorflow', 'torch'} & set(sys.modules)))")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.0


def test_progress_lines_name_step_loss_speed_and_time_left(tmp_path, capsys):
    with Logger(tmp_path, total_steps=20, every=5, tensorboard=False, name="align") as logger:
        for row in rows(1, 20):
            logger.write(row)
            logger.tick(row["step"])
        logger.write({"step": 20, "validation/wer": 0.25})
        logger.note("done [x]")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in lines[:-2]] == ["1/20", "6/20", "11/20", "16/20", "20/20"]
    assert lines[0].startswith("align: step 1/20") and "validation/wer 0.25" in lines[-2]
    assert "loss 0.1667" in lines[1] and "5 h audio/h" in lines[1] and "left" in lines[1]
    assert lines[-1] == "done [x]"


def test_object_stores_get_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "REWRITE", 0.0)
    logger = Logger(tmp_path, console=False, tensorboard=False)
    logger._file.close()
    logger._file = None  # as for gs://, where a file cannot be appended to
    for row in rows(1, 3):
        logger.write(row)
    assert len(log.read(tmp_path)) == 3
    logger.close()


@pytest.mark.parametrize("seconds, text", [(0.2, "0 s"), (75, "1 min 15 s"), (4000, "1 h 06 min")])
def test_duration(seconds, text):
    assert log.duration(seconds) == text
