"""The changes do what their names say, and the sweep pairs student and teacher."""
import numpy as np
import pytest

from jaxslim import cli, robust
from jaxslim.data import augment, load_rows

ROWS = load_rows("bundled:prompts-en/validation")[:3]
RNG = np.random.default_rng(0)
WAVE = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000).astype("float32") * 0.3


def power(x):
    return float(np.mean(np.square(x, dtype=np.float64)))


@pytest.mark.parametrize("snr", [20.0, 5.0])
def test_noise_has_its_level(snr):
    out = augment.noise(snr, snr)(WAVE, RNG)
    assert 10 * np.log10(power(WAVE) / power(out - WAVE)) == pytest.approx(snr, abs=0.3)


def test_telephone_keeps_speech_and_drops_the_rest():
    t = np.arange(16000) / 16000
    for hertz, kept in ((1000, True), (100, False), (6000, False)):
        tone = 0.3 * np.sin(2 * np.pi * hertz * t).astype("float32")
        mixed = augment.telephone()(tone + 0.3 * np.sin(2 * np.pi * 500 * t).astype("float32"), RNG)
        level = abs(np.mean(mixed * np.exp(-2j * np.pi * hertz * t))) * 2
        assert (level > 0.2) if kept else (level < 0.03)
    assert augment.telephone()(WAVE[:15999], RNG).shape == (15999,)


def test_room_decays_in_its_time():
    click = np.zeros(16000, "float32")
    click[100] = 1.0
    out = augment.room(0.5, 0.5)(click, RNG)
    assert out[100] == pytest.approx(1.0, abs=1e-3) and np.abs(out[:100]).max() < 1e-6
    early, late = power(out[200:1800]), power(out[6500:8100])
    assert 10 * np.log10(early / late) == pytest.approx(60 * (6300 / 8000), abs=4)


def test_speed_changes_length_and_rows_say_so():
    for name, factor in (("speed 0.9", 0.9), ("speed 1.1", 1.1), ("clean", 1.0)):
        changed = robust.Changed(ROWS, *robust.CONDITIONS[name])
        assert len(changed.audio(0)) == pytest.approx(len(ROWS.audio(0)) / factor, abs=4)
        assert changed[:2].duration(0) == pytest.approx(ROWS.duration(0) / factor)


def test_changes_depend_on_seed_and_row_only():
    a, b = (robust.Changed(ROWS, *robust.CONDITIONS["noise 10 dB"]) for _ in range(2))
    assert np.array_equal(a.audio(1), b.audio(1)) and not np.array_equal(a.audio(1), ROWS.audio(1))


def test_sweep(capsys):
    words = ["eval", "bundled:wav2vec2-ctc-en", "--data", "bundled:prompts-en/validation", "--limit", "2",
             "--robustness", "clean", "telephone", "--baseline", "bundled:wav2vec2-ctc-en"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "telephone" in out and "+0.0 (+0.0 to +0.0)" in out
    assert cli.main([*words[:7], "storm"]) == 2 and "Unknown conditions ['storm']" in capsys.readouterr().err
