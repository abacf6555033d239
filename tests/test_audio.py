"""Any audio file -> 16 kHz mono float32, or one sentence that names the file and what is wrong with it."""

import io
import sys

import numpy as np
import pytest

from jaxslim.data import AudioError, DataError, audio, augment

sf = pytest.importorskip("soundfile")


def tone(seconds=0.5, rate=16000, channels=1, hertz=440.0):
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, 1).astype(np.float32)  # (samples, channels)


def encoded(wave, rate=16000, format="WAV", **options):
    out = io.BytesIO()
    sf.write(out, wave, rate, format=format, **options)
    return out.getvalue()


def hertz(wave, rate=16000):
    return np.argmax(np.abs(np.fft.rfft(wave))) * rate / len(wave)


@pytest.mark.parametrize("channels, rate", [(1, 16000), (2, 44100), (1, 8000), (6, 48000)])
@pytest.mark.parametrize(
    "format, options", [("WAV", {}), ("FLAC", {}), ("OGG", {}), ("MP3", {}), ("OGG", {"subtype": "OPUS"})]
)
def test_formats_rates_channels(format, options, channels, rate):
    if format == "MP3" and channels > 2 or options and rate == 44100:
        pytest.skip("the format has no such thing")
    wave = audio.load(encoded(tone(0.5, rate, channels), rate, format, **options))
    assert wave.dtype == np.float32 and wave.ndim == 1
    assert len(wave) == pytest.approx(8000, abs=1200 if format == "MP3" else 5)
    assert hertz(wave) == pytest.approx(440, abs=3)
    assert np.abs(wave).max() == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("channels", [1, 2])
def test_opus_is_the_same_whoever_decodes_it(channels):
    pytest.importorskip("av")
    for rate in (48000, 16000):  # at 16 kHz libsndfile alone: it decodes to that rate
        data = encoded(tone(0.5, rate, channels), rate, "OGG", subtype="OPUS")
        assert audio._opus_at_48(data) == (rate == 48000)
        have, at = audio.decode(data, "clip")
        want, same = sf.read(io.BytesIO(data), dtype="float32", always_2d=True)
        assert at == same == rate and have.shape == want.shape and np.abs(have - want).max() < 1e-6
    with pytest.raises(audio.AudioError, match="not readable"):
        audio.decode(encoded(tone(0.5, 48000), 48000, "OGG", subtype="OPUS")[:60], "clip")


@pytest.mark.parametrize("container, codec", [("mp4", "aac"), ("webm", "libopus")])
def test_pyav_reads_the_rest(tmp_path, container, codec):
    av = pytest.importorskip("av")
    path = tmp_path / f"clip.{container}"
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=48000)
        stream.layout = "stereo"
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(tone(1.0, 48000, 2).T), format="fltp", layout="stereo")
        frame.sample_rate = 48000
        fifo = av.AudioFifo()
        fifo.write(frame)
        size = stream.codec_context.frame_size or 960
        for part in [*fifo.read_many(size), *filter(None, [fifo.read(partial=True)]), None]:
            out.mux(stream.encode(part))
    wave = audio.load(path)
    assert len(wave) == pytest.approx(16000, abs=1200) and hertz(wave) == pytest.approx(440, abs=3)
    assert audio.seconds(path) == pytest.approx(1.0, abs=0.08)


def test_channels_are_averaged_and_samples_exact():
    wave = (np.random.default_rng(0).integers(-9000, 9000, (1000, 2)) / 32768).astype(np.float32)
    np.testing.assert_allclose(audio.load(encoded(wave)), wave.mean(1), atol=1e-7)


@pytest.mark.parametrize("soxr", [True, False])
def test_resample_keeps_pitch_and_length(monkeypatch, soxr):
    if soxr:
        pytest.importorskip("soxr")
    else:
        monkeypatch.setitem(sys.modules, "soxr", None)
    wave = audio.resample(tone(1.0, 22050)[:, 0], 22050, 16000)
    assert len(wave) == pytest.approx(16000, abs=2) and wave.dtype == np.float32
    inner = slice(200, -200)
    np.testing.assert_allclose(wave[inner], tone(1.0)[: len(wave), 0][inner], atol=5e-3)


def broken(tmp_path):
    nan = tone()
    nan[100:103] = np.nan
    noise = np.random.default_rng(0).bytes(4000)
    return {
        "missing": (tmp_path / "nowhere.wav", "cannot be read: No such file"),
        "folder": (tmp_path, "cannot be read: Is a directory"),
        "empty": (b"", "empty"),
        "noise": (noise, "not readable as audio"),
        "text": (b"<html>404 not found</html>" * 20, "not readable as audio"),
        "cut": (encoded(tone(), format="FLAC")[:30], "not readable as audio"),
        "samples": (encoded(tone(0)), "no audio samples"),
        "nan": (encoded(nan, subtype="FLOAT"), "3 samples that are NaN"),
        "inf": (
            encoded(np.where(np.arange(8000)[:, None] == 7, np.inf, tone()), subtype="DOUBLE"),
            "1 samples that are NaN",
        ),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    }


CASES = "missing folder empty noise text cut samples nan inf lfs".split()


@pytest.mark.parametrize("case", CASES)
def test_broken_audio_is_named(tmp_path, case):
    source, message = broken(tmp_path)[case]
    if isinstance(source, bytes):
        (tmp_path / "clip.wav").write_bytes(source)
        for given, name in ((tmp_path / "clip.wav", "clip.wav"), (source, "given as bytes")):
            with pytest.raises(AudioError, match=message) as error:
                audio.load(given)
            assert name in str(error.value) and isinstance(error.value, (DataError, ValueError))
            assert "\n" not in str(error.value)
    else:
        with pytest.raises(AudioError, match=message):
            audio.load(source)
    if case in ("missing", "empty", "noise", "lfs"):
        with pytest.raises(AudioError):
            audio.seconds(source)


def test_without_soundfile_the_error_says_what_to_install(monkeypatch):
    data = encoded(tone())
    monkeypatch.setitem(sys.modules, "soundfile", None)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install jaxslim\[audio\]"):
        audio.load(data)


def test_pyav_alone_suffices(monkeypatch):
    pytest.importorskip("av")
    data, expected = encoded(tone(0.5, 8000), 8000), audio.load(encoded(tone(0.5, 8000), 8000))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    np.testing.assert_allclose(audio.load(data), expected, atol=1e-6)
    assert audio.seconds(data) == 0.5


def test_url_goes_through_epath(tmp_path, monkeypatch):
    epath = pytest.importorskip("etils.epath")
    (tmp_path / "a.wav").write_bytes(encoded(tone()))
    with pytest.raises(AudioError, match="nobody://x/a.wav cannot be read: no reader for nobody://"):
        audio.load("nobody://x/a.wav")
    monkeypatch.setattr(epath, "Path", lambda url: tmp_path / url.removeprefix("gs://bucket/"))
    assert audio.load("gs://bucket/a.wav").shape == (8000,)
    with pytest.raises(AudioError, match="gs://bucket/b.wav cannot be read: No such file"):
        audio.load("gs://bucket/b.wav")


def test_normalize_equals_transformers():
    extractor = pytest.importorskip("transformers").Wav2Vec2FeatureExtractor(do_normalize=True)
    wave = 3 * tone()[:, 0] + 0.2
    expected = extractor(wave, sampling_rate=16000, return_tensors="np").input_values[0]
    np.testing.assert_allclose(audio.normalize(wave), expected, atol=1e-6)
    assert not audio.normalize(np.zeros(400, np.float32)).any()


def test_augmentation():
    wave = tone()[:, 0]
    slow = augment.speed_perturb((0.8,))(wave, np.random.default_rng(0))
    assert len(slow) == pytest.approx(10000, abs=2) and hertz(slow) == pytest.approx(352, abs=3)
    louder = augment.gain(6, 6)(wave, np.random.default_rng(0))
    assert louder.std() / wave.std() == pytest.approx(10 ** (6 / 20), rel=1e-4)
    noisy = augment.noise(20, 20)(wave, np.random.default_rng(0))
    assert 20 * np.log10(wave.std() / (noisy - wave).std()) == pytest.approx(20, abs=0.5)
    line = augment.telephone()(wave, np.random.default_rng(0))
    assert line.shape == wave.shape and hertz(line) == pytest.approx(hertz(wave), abs=3)
    echo = augment.room(0.3, 0.3)(wave, np.random.default_rng(0))
    assert echo.shape == wave.shape and np.abs(echo - wave).max() > 0.01
    both = augment.build((0.9,), {"noise": 0.0, "room": 0.5, "telephone": 0.5}, 16000)
    assert both.stretch == pytest.approx(1 / 0.9) and len(both.steps) == 3 and augment.build((), {}, 16000) is None
    changed = [len(set(augment.sometimes(augment.gain(6, 6), 0.5)(np.ones(1), np.random.default_rng(i))) - {1.0})
               for i in range(200)]
    assert 70 < sum(changed) < 130
    chain = augment.compose(augment.speed_perturb(), augment.noise())
    assert chain.stretch == pytest.approx(1 / 0.9)
    again = [chain(wave, np.random.default_rng(3)) for _ in range(2)]
    np.testing.assert_array_equal(*again)
    assert again[0].dtype == np.float32
