"""Features equal to those of transformers' extractors, on noise and on real speech, alone and in a padded batch."""
import numpy as np
import pytest
import tiny

from jaxslim.data import features
from jaxslim.data.rows import load_rows


def clips():
    rows = load_rows("bundled:prompts-en/test")
    rng = np.random.default_rng(0)
    return [np.asarray(rows.audio(0), np.float32), 0.1 * rng.standard_normal(16000).astype(np.float32),
            np.asarray(rows.audio(3), np.float32)[:15841], 0.3 * rng.standard_normal(9999).astype(np.float32)]


def extractor(name, **options):
    import transformers

    return getattr(transformers, name)(**options)


@pytest.mark.parametrize("mels", [80, 128])
def test_parakeet(mels):
    pytest.importorskip("torch")
    waves = clips()
    theirs = extractor("ParakeetFeatureExtractor", feature_size=mels)
    for group in (waves, waves[:1], waves[3:]):
        want = theirs(group, sampling_rate=16000, return_tensors="np")
        have = features.parakeet(group, mels)
        np.testing.assert_array_equal(have["attention_mask"], want["attention_mask"])
        assert tiny.close(have["input_features"], want["input_features"]) < 1e-4


def test_fbank():
    waves = clips()
    theirs = extractor("SeamlessM4TFeatureExtractor")
    for group in (waves, waves[1:2], waves[3:]):
        want = theirs(group, sampling_rate=16000, return_tensors="np")
        have = features.fbank(group)
        np.testing.assert_array_equal(have["attention_mask"], want["attention_mask"])
        assert tiny.close(have["input_features"], want["input_features"]) < 1e-4


@pytest.mark.parametrize("make", [features.parakeet, features.fbank])
def test_too_short_audio_is_named(make):
    with pytest.raises(ValueError, match="too short"):
        make([np.zeros(150, np.float32)])


def power(x, window, size):
    """Power spectrum (T, F) of centred frames of x, in fp64, straight from its definition."""
    window = np.pad(window, (size - len(window)) // 2)
    return np.abs(np.fft.rfft(np.lib.stride_tricks.sliding_window_view(x, size)[::160] * window)) ** 2


def whisper_truth(wave):
    from transformers.audio_utils import mel_filter_bank

    bank = mel_filter_bank(201, 80, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    x = np.pad(np.pad(np.float64(wave), (0, 480_000 - len(wave))), (200, 200), mode="reflect")
    log = np.log10(np.maximum(power(x, np.hanning(401)[:-1], 400)[:3000] @ bank, 1e-10))
    return (np.maximum(log, log.max() - 8).T + 4) / 4


def parakeet_truth(wave):
    from transformers.audio_utils import mel_filter_bank

    bank = mel_filter_bank(257, 80, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    x = np.float64(wave)
    x = np.pad(np.append(x[:1], x[1:] - 0.97 * x[:-1]), (256, 256))
    log = np.log(power(x, np.hanning(400), 512) @ bank + 2.0**-24)[: len(wave) // 160]
    return (log - log.mean(0)) / (log.std(0, ddof=1) + 1e-5)


def test_where_the_extractors_and_we_differ_they_are_wrong():
    """Both extractors work in fp32 with PyTorch, where the quietest bins of a frame drown in the rounding of the
    loudest. On real speech they are more than 1e-5 from the fp64 result, we less than 1e-6: all of the difference
    between us and them is theirs."""
    pytest.importorskip("torch")
    from jaxslim.data import mel

    waves = [clips()[0], clips()[2]]
    theirs = extractor("WhisperFeatureExtractor")(waves, sampling_rate=16000, return_tensors="np")["input_features"]
    ours, truth = np.asarray(mel.features(waves)[0]), np.stack([whisper_truth(w) for w in waves])
    assert np.abs(ours - truth).max() < 1e-6 < 1e-5 < np.abs(theirs - truth).max() < 1e-4
    theirs = extractor("ParakeetFeatureExtractor")(waves[:1], sampling_rate=16000, return_tensors="np")
    truth, count = parakeet_truth(waves[0]), theirs["attention_mask"].sum()
    ours = features.parakeet(waves[:1])["input_features"][0, :count]
    assert np.abs(ours - truth).max() < 1e-6 < 1e-5 < np.abs(theirs["input_features"][0, :count] - truth).max() < 1e-3
