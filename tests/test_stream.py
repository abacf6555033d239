"""Long audio in chunks: what a stream gives is what one pass gives; what cannot stream is named."""
import json

import jax
import numpy as np
import pytest
import tiny
from conftest import LETTERS, SHAPE, write_model

from jaxslim import hub, stream
from jaxslim.cli import main
from jaxslim.spec import SpecError
from jaxslim.train.log import wav_bytes
from jaxslim.transcription import transcribe

MIXERS = {"pre-norm": (dict(), [("mamba2", {"direction": "causal", "head_dim": 8, "state": 6, "chunk": 8}),
                                ("t2r", {"features": 5, "causal": True, "window": 6})]),
          "post-norm": (dict(do_stable_layer_norm=False), [
              ("gated_deltanet", {"direction": "causal", "head_dim": 8, "chunk": 8}), ("elu", {"causal": True})]),
          "gated": (dict(), [("gla", {"direction": "causal", "head_dim": 8, "key_dim": 4, "chunk": 8})] * 2)}


def model_of(kind, **changes):
    more, mixers = MIXERS[kind]
    spec = tiny.slim(**{**SHAPE, **more, "num_hidden_layers": 2, **changes}).spec
    for i, (mixer, options) in enumerate(mixers):
        spec = spec.with_block(f"encoder.{i}.attention", mixer=mixer, options=options)
    return tiny.slim(spec, seed=2)


@pytest.mark.parametrize("kind", ["pre-norm", *(
    pytest.param(kind, marks=pytest.mark.slow) for kind in ("post-norm", "gated"))])
def test_a_stream_is_one_pass(kind):
    """Audio in pieces of any size; the same symbols and no frame more or less."""
    model, wave = model_of(kind), tiny.waves(40 * 61 + 17)[0][0]
    logits = np.asarray(model(input_values=wave[None]).logits)[0]
    two = np.sort(logits, -1)[:, -2:]
    assert (two[:, 1] - two[:, 0]).min() > 1e-5  # no ties that rounding could turn
    for cuts in ([0, 5, 300, 1000, 1001, len(wave)], [0, len(wave)]):
        run = stream.Causal(model, 16)
        found = [run.feed(wave[a:b]) for a, b in zip(cuts, cuts[1:])] + [run.finish()]
        np.testing.assert_array_equal(np.concatenate(found), logits.argmax(-1))
        assert len(found[-2]) > 0  # symbols come before the end
    assert len(stream.Causal(model).finish()) == 0 and len(stream.Causal(model, 16).feed(wave[:9])) == 0


def test_one_program_and_a_state_of_fixed_size():
    model = model_of("pre-norm")
    run, before = stream.Causal(model, 16), stream._step._cache_size()
    shapes = jax.tree.map(np.shape, run.state)
    for seed in range(3):
        run.feed(tiny.waves(40 * 40, seed=seed)[0][0])
        assert jax.tree.map(np.shape, run.state) == shapes and len(run.wave) < 40 * 17
    assert stream._step._cache_size() - before <= 1


def test_windows_cover_every_frame_once():
    spec = tiny.slim(**SHAPE).spec
    stride, field = stream.geometry(spec)
    assert (stride, field) == (40, 45)
    for total, chunk, context in ((7, 3, 2), (20, 6, 4), (5, 10, 3), (31, 7, 0)):
        wave = np.arange(1.0, 1 + (total - 1) * stride + field, dtype=np.float32)
        seen = []
        for part, valid, first, last in stream.windows(wave, spec, chunk, context):
            assert len(part) == (chunk + 2 * context - 1) * stride + field
            start = round((part[0] - 1) / stride)
            assert (part[:valid] == wave[start * stride : start * stride + valid]).all() and (part[valid:] == 0).all()
            seen += range(start + first, start + last)
            assert first >= min(context, start + first)  # the context before is whole, or reaches the beginning
        assert seen == list(range(total))
    assert list(stream.windows(np.zeros(44, np.float32), spec, 3, 1)) == []


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A causal and a bidirectional model with their vocabulary, and a clip of 0.8 s."""
    folder = tmp_path_factory.mktemp("stream")
    write_model(folder / "both")
    hub.save(model_of("pre-norm"), folder / "causal", source=folder / "both")
    rng = np.random.default_rng(0)
    (folder / "clip.wav").write_bytes(wav_bytes(0.3 * rng.standard_normal(12800)))
    return {name: str(folder / name) for name in ("both", "causal", "clip.wav")}


@pytest.mark.parametrize("name, options", [("causal", dict(chunk_seconds=0.04)),
                                           ("both", dict(chunk_seconds=0.3, context_seconds=0.7))])
def test_transcripts_in_chunks_equal_those_of_one_pass(folders, name, options):
    """Bidirectional: the context reaches over the whole clip, so every window is one pass."""
    whole = transcribe(folders[name], folders["clip.wav"])[0]
    parts = transcribe(folders[name], folders["clip.wav"], **options)[0]
    assert parts["text"] == whole["text"] and len(whole["text"]) > 10 and set(whole["text"]) <= {*"".join(LETTERS), " "}
    assert transcribe(folders["both"], folders["clip.wav"], chunk_seconds=0.05, context_seconds=0)[0]["text"]


def test_command_line(folders, capsys):
    assert main(["transcribe", folders["causal"], folders["clip.wav"], "--chunk-seconds", "0.04",
                 "--output-format", "json"]) == 0
    whole = transcribe(folders["causal"], folders["clip.wav"])
    assert json.loads(capsys.readouterr().out)[0]["text"] == whole[0]["text"]


def test_what_cannot_stream_is_named():
    causal = model_of("pre-norm")
    assert stream.is_causal(causal.spec)
    for spec, message in (
            (causal.spec.with_block("encoder.1.attention", mixer=None, options=None),
             "encoder.1.attention: mixer softmax looks at later frames, so it cannot stream; convert it to a causal"),
            (causal.spec.replace(config={**causal.spec.config, "feat_extract_norm": "group"}), "over the whole clip"),
            (causal.spec.replace(head="none"), "with a CTC head.* not wav2vec2 with head none")):
        assert not stream.is_causal(spec)
        with pytest.raises(SpecError, match=message):
            stream.Causal(causal.replace(spec=spec))
