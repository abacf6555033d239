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
        have = features.for_family("wav2vec2-bert", group)
        np.testing.assert_array_equal(have["attention_mask"], want["attention_mask"])
        assert tiny.close(have["input_features"], want["input_features"]) < 1e-4


@pytest.mark.parametrize("make", [features.parakeet, features.fbank])
def test_too_short_audio_is_named(make):
    with pytest.raises(ValueError, match="too short"):
        make([np.zeros(150, np.float32)])
