"""Decoding with Whisper against `generate` of PyTorch transformers: the same tokens, the same timestamps."""
import functools
import json

import numpy as np
import pytest
import tiny_tasks
import tiny_whisper as tw

from jaxslim import hub
from jaxslim.data import mel, task_of
from jaxslim.data.rows import load_rows
from jaxslim.decode import Autoregressive
from jaxslim.generate import compression_ratio, generate, options

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # tiny products: more threads are many times slower
IDS = dict(decoder_start_token_id=tw.SOT, eos_token_id=tw.EOS, pad_token_id=tw.EOS, max_length=20,
           no_timestamps_token_id=tw.NOTIMESTAMPS, prev_sot_token_id=tw.PREV, max_initial_timestamp_index=25,
           lang_to_id={"<|en|>": tw.EN, "<|de|>": tw.DE}, is_multilingual=True,
           task_to_id={"translate": tw.TRANSLATE, "transcribe": tw.TRANSCRIBE},
           suppress_tokens=[3, 7, 11, tw.SOT, tw.EN, tw.DE, tw.TRANSLATE, tw.TRANSCRIBE, tw.STARTOFLM, tw.PREV,
                            tw.NOSPEECH], begin_suppress_tokens=[5, tw.EOS])


@functools.lru_cache(maxsize=4)
def models(seed=0, frames=50, **changes):
    import tempfile

    return tw.pair(tempfile.mkdtemp(), seed=seed, frames=frames, **changes)


def reference(model, features, mask=None, **given):
    """Token rows and segments of transformers, with the special tokens in its generation config."""
    from transformers import GenerationConfig

    config = GenerationConfig(**IDS)
    kept = ("num_beams", "length_penalty", "early_stopping", "max_length", "suppress_tokens")
    call = {k: given.pop(k) for k in list(given) if k not in kept}
    if "prompt_ids" in call:
        call["prompt_ids"] = torch.tensor(call["prompt_ids"])
    for key, value in given.items():
        setattr(config, key, value)
    with torch.no_grad():
        out = model.generate(torch.from_numpy(np.asarray(features)), generation_config=config, return_segments=True,
                             attention_mask=None if mask is None else torch.from_numpy(mask), **call)
    return out["sequences"].numpy(), out["segments"]


def same(model, ours, features, mask=None, **given):
    """Both decode alike; returns ours."""
    want, segments = reference(model, features, mask, **given)
    have = generate(ours, features, mask, **{**IDS, **given})
    np.testing.assert_array_equal(have.sequences, want)
    assert [len(s) for s in have.segments] == [len(s) for s in segments]
    for a, b in zip(sum(have.segments, []), sum(segments, [])):
        np.testing.assert_array_equal(a["tokens"], b["tokens"].numpy())
        assert (a["start"], a["end"]) == (float(b["start"]), float(b["end"]))
    return have


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 20))])
def test_random_weights(seed):
    model, ours = models(seed=seed, scale=2.0)
    x = tw.features(2, frames=50, seed=seed)
    for beams in (1, 4):
        have = same(model, ours, x, num_beams=beams, return_timestamps=seed % 2 == 1, language="en",
                    **quiet(seed % 2, 50), early_stopping=(False, True, "never")[seed % 3],
                    length_penalty=(1.0, 0.6, 2.0)[seed // 3 % 3])
        assert have.sequences.shape[1] > 3


@pytest.mark.parametrize("start", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(4, 20, 4))])
def test_real_audio(start):
    """Four clips a run, each side with its own log-mel features."""
    from transformers import WhisperFeatureExtractor

    rows = load_rows("bundled:prompts-en/test")
    clips = [rows.audio(i) for i in range(start, start + 4)]
    theirs = WhisperFeatureExtractor()(clips, sampling_rate=16000, return_tensors="np")["input_features"]
    x, _ = mel.features(clips)
    model, ours = models(seed=start, frames=1500, scale=2.0)
    for beams in (1, 3):  # the language is detected
        given = dict(num_beams=beams, return_timestamps=start % 8 == 0, max_length=10, **quiet(start % 8 == 0, 1500))
        want, _ = reference(model, theirs, **given)
        have = generate(ours, x, **{**IDS, **given})
        np.testing.assert_array_equal(have.sequences, want)


def quiet(stamps, frames):
    """Without timestamps none may be said: random models would, and then transformers may never end."""
    return {} if stamps else {"suppress_tokens": [*IDS["suppress_tokens"], *range(tw.BEGIN, tw.BEGIN + frames + 1)]}


PROMPT = [tw.PREV, 12, 13, 14]
LONG = {
    "plain": dict(language="en"),
    "translate, conditioned": dict(language="German", task="translate", condition_on_prev_tokens=True),
    "fallback": dict(language="en", condition_on_prev_tokens=True, temperature=(0.0, 1e-5, 2e-5),
                     logprob_threshold=-1.0, compression_ratio_threshold=1.2),  # nearly the argmax
    "no speech": dict(language="en", temperature=(0.0, 1e-5), logprob_threshold=-0.3, no_speech_threshold=0.001),
    "prompt": dict(prompt_ids=PROMPT),
    "prompt, conditioned": dict(prompt_ids=PROMPT, condition_on_prev_tokens=True, language="en"),
    "prompt everywhere": dict(prompt_ids=PROMPT, condition_on_prev_tokens=True, prompt_condition_type="all-segments",
                              language="en"),
    "beams": dict(language="en", num_beams=3, temperature=(0.0, 1e-5), logprob_threshold=-1.0),
}


@pytest.mark.parametrize("name", [n if n in ("plain", "no speech", "prompt everywhere") else
                                  pytest.param(n, marks=pytest.mark.slow) for n in LONG])
def test_long_form(name):
    model, ours = models(seed=1, scale=2.0)  # windows of 100 frames, audio of 250
    have = same(model, ours, tw.features(1, frames=125, seed=3), **LONG[name])
    assert len(have.segments[0]) == 0 if name == "no speech" else len(have.segments[0]) > 2


@pytest.mark.slow
def test_long_form_of_several_clips():
    model, ours = models(seed=1, scale=2.0)
    x, ends = tw.features(3, frames=125, seed=4), np.array([250, 130, 90])
    mask = (np.arange(250) < ends[:, None]).astype(np.int64)
    together = same(model, ours, x, mask, language=["en", "de", "en"])
    hot = dict(language=["en", "de", "en"], condition_on_prev_tokens=True, temperature=(0.0, 1e-5),
               logprob_threshold=-1.0)
    together = generate(ours, x, mask, **{**IDS, **hot})
    for i, end in enumerate(ends):  # where transformers lets clips disturb each other, each is as if alone
        one = x[i : i + 1, :, :end] if end > 100 else np.where(mask[i, :100], x[i : i + 1, :, :100], 0)
        alone = generate(ours, one, **{**IDS, **hot, "language": hot["language"][i], "return_timestamps": True})
        said = np.concatenate([s["tokens"] for s in together.segments[i]])
        if end > 100:
            np.testing.assert_array_equal(said, alone.sequences[0])


@pytest.mark.slow
def test_long_real_audio():
    rows = load_rows("bundled:prompts-en/test")
    wave, i = np.zeros(0, np.float32), 0
    while len(wave) < 40 * 16000:
        wave, i = np.concatenate([wave, rows.audio(i)]), i + 1
    x, _ = mel.features([wave], longest=True)
    model, ours = models(seed=4, frames=1500, scale=2.0)
    have = same(model, ours, x, language="en", condition_on_prev_tokens=True)
    assert x.shape[-1] > 4000 and have.segments[0][-1]["end"] > 30


def test_sampling_follows_the_seed():
    _, ours = models(seed=1, scale=2.0)
    x = tw.features(2, frames=50)
    one, again, other = (generate(ours, x, **{**IDS, **quiet(False, 50), "temperature": 1.0, "language": "en",
                                          "seed": s}).sequences
                         for s in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert one.shape != other.shape or (one != other).any()


def test_old_checkpoints_force_tokens_by_place():
    model, ours = models(seed=2, scale=2.0)
    x = tw.features(1, frames=50)
    forced = generate(ours, x, **{**IDS, **quiet(False, 50), "forced_decoder_ids": [[1, tw.DE], [2, tw.TRANSLATE]]})
    named = generate(ours, x, **{**IDS, **quiet(False, 50), "language": "de", "task": "translate"})
    np.testing.assert_array_equal(forced.sequences, named.sequences)


@pytest.mark.parametrize("given, message", [
    (dict(num_beam=2), "Did you mean 'num_beams'"), (dict(language="xx"), "none of this model's"),
    (dict(task="sing"), "task 'sing'"), (dict(no_speech_threshold=0.5), "needs logprob_threshold"),
    (dict(max_new_tokens=63), "lower max_new_tokens"), (dict(is_multilingual=False, task="translate"), "English only"),
    (dict(prompt_ids=PROMPT, prompt_condition_type="all-segments"), "needs condition_on_prev_tokens")])
def test_bad_options_are_named(given, message):
    _, ours = models(seed=1, scale=2.0)
    with pytest.raises(ValueError, match=message):
        generate(ours, tw.features(1, frames=50), **{**IDS, **given})


def test_long_audio_needs_timestamps_and_masks():
    _, ours = models(seed=1, scale=2.0)
    with pytest.raises(ValueError, match="needs timestamps"):
        generate(ours, tw.features(1, frames=125), **{**IDS, "return_timestamps": False})
    with pytest.raises(ValueError, match="attention_mask"):
        generate(ours, tw.features(2, frames=125), **IDS)


def test_compression_ratio_and_defaults():
    assert compression_ratio(np.array([5] * 200), 51865) > 10 > 1 > compression_ratio(np.arange(8), 51865)
    _, ours = models(seed=1, scale=2.0)
    assert options(ours.spec).max_length == 64 and options(ours.spec).eos_token_id == tw.EOS


def test_a_published_config_without_timestamps_reads_long_audio(tmp_path):
    """`return_timestamps: false` stands in published generation configs; `eval` of a clip beyond the window goes on."""
    folder = tiny_tasks.folder("whisper", tmp_path / "m")
    path = tmp_path / "m" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"return_timestamps": False}))
    model = hub.load(folder)
    task = task_of(model.spec, folder)
    wave = 0.1 * np.random.default_rng(0).standard_normal(40000).astype(np.float32)
    batch = task.extractor([wave], 40000) | {"row": np.array([0]), "samples": np.array([40000])}
    assert batch["input_features"].shape[-1] > 2 * model.spec["max_source_positions"]
    options = {**task.generation, "max_length": 12}
    texts = [Autoregressive(model, options=options | stamps, timed=False)(batch)[0]["ids"]
             for stamps in ({}, {"return_timestamps": True})]
    np.testing.assert_array_equal(*texts)


def test_a_clip_says_the_same_beside_a_longer_one(tmp_path):
    folder = tiny_tasks.folder("whisper", tmp_path / "m")
    model = hub.load(folder)
    task = task_of(model.spec, folder)
    rng, window = np.random.default_rng(0), 2 * model.spec["max_source_positions"]
    waves = [0.1 * rng.standard_normal(n).astype(np.float32) for n in (9000, 40000, 12000)]
    decode = Autoregressive(model, options={**task.generation, "max_length": 12}, timed=False)

    def said(group):
        lengths = np.array(list(map(len, group)))
        batch = task.extractor(group, lengths.max()) | {"row": np.arange(len(group)), "samples": lengths}
        out, _ = decode(batch)
        assert batch["input_features"].shape[-1] > window or len(group) == 1
        return [ids[:n].tolist() for ids, n in zip(out["ids"], out["lengths"])]

    together = said(waves)
    assert together == [said([w])[0] for w in waves] and len(together[1]) > 0
