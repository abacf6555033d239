"""Decoding with Whisper against `generate` of PyTorch transformers: the same tokens, the same timestamps."""
import functools

import numpy as np
import pytest
import tiny_whisper as tw

from jaxslim.data import mel
from jaxslim.data.rows import load_rows
from jaxslim.generate import compression_ratio, generate, options

torch = pytest.importorskip("torch")
IDS = dict(decoder_start_token_id=tw.SOT, eos_token_id=tw.EOS, pad_token_id=tw.EOS, max_length=48,
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
    call = {k: given.pop(k) for k in list(given) if k not in ("num_beams", "length_penalty", "early_stopping", "max_length")}
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


@pytest.mark.parametrize("seed", range(20))
def test_random_weights(seed):
    model, ours = models(seed=seed, scale=2.0)
    x = tw.features(2, frames=50, seed=seed)
    lengths = set()
    for beams in (1, 4):
        for stamps in (False, True)[seed % 2 :][:1] if beams == 1 else (seed % 4 < 2,):
            have = same(model, ours, x, num_beams=beams, return_timestamps=stamps, language="en",
                        early_stopping=(False, True, "never")[seed % 3], length_penalty=(1.0, 0.6, 2.0)[seed // 3 % 3])
            lengths.add(have.sequences.shape[1])
    assert max(lengths) > 3
