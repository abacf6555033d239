"""The s3prl-style upstream: lists of waveforms in, hidden states out, equal to the model's own."""
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_tasks
from conftest import SHAPE

from jaxslim.data import task_of
from jaxslim.methods.generate import Generate
from jaxslim.slim import Slim
from jaxslim.upstream import Upstream

WAVES = [np.random.default_rng(i).standard_normal(n).astype(np.float32) for i, n in enumerate((3000, 1800, 2222))]


@pytest.mark.parametrize("kind", ["stock", "generative"])
def test_states_are_those_of_the_model(kind):
    model = tiny.slim(**SHAPE)
    if kind == "generative":
        model = tiny.slim(Generate(student="previous", target_layers=(1,)).spec(model.spec))
    upstream = Upstream(model)
    out = upstream(WAVES)
    assert len(out["hidden_states"]) == 2    # the embedding, and a layer or what is generated of it
    frames = upstream.lengths([len(w) for w in WAVES])
    assert out["last_hidden_state"].shape == (3, max(frames), 32) and frames[0] == max(frames)
    row, wave = 1, (WAVES[1] - WAVES[1].mean()) / np.sqrt(WAVES[1].var() + 1e-7)
    own = model(input_values=wave[None], output_hidden_states=True)
    for have, want in zip(out["hidden_states"], own.hidden_states):
        tiny.close(have[row, : frames[row]], want[0], 2e-5)
        assert not have[row, frames[row]:].any()
    tiny.close(out["last_hidden_state"][row, : frames[row]], own.last_hidden_state[0], 2e-5)
    every = upstream.features(WAVES)
    tiny.close(every[1], np.stack([h[1, : frames[1]] for h in out["hidden_states"]]), 2e-5)
    assert upstream.get_downsample_rates("hidden_states") == 40


def test_torch_in_torch_out(small):
    torch = pytest.importorskip("torch")
    from jaxslim.upstream import UpstreamExpert

    expert = UpstreamExpert(small["model"]).eval()
    wavs = [torch.from_numpy(w) for w in WAVES[:2]]
    out = expert(wavs)
    want = Upstream(small["model"])(WAVES[:2])
    assert isinstance(out["last_hidden_state"], torch.Tensor) and out["last_hidden_state"].device == wavs[0].device
    np.testing.assert_array_equal(out["hidden_states"][1].numpy(), want["hidden_states"][1])
    assert expert.get_downsample_rates("hidden_states") == 40 and not list(expert.parameters())


@pytest.mark.slow
def test_other_inputs(tmp_path):
    """Log-mel models: Whisper's encoder."""
    folder = tiny_tasks.folder("whisper", tmp_path / "whisper")
    upstream = Upstream(folder)
    wave = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    out = upstream([wave, wave[:4000]])
    assert [x.shape for x in out["hidden_states"]] == [(2, 25, 32)] * 2
    spec = upstream.model.spec
    batch = task_of(spec, folder).extractor([wave], 8000)
    ids = jnp.zeros((1, 1), jnp.int32)
    own = upstream.model(input_features=batch["input_features"], decoder_input_ids=ids, output_hidden_states=True)
    tiny.close(out["hidden_states"][1][0], own.encoder_hidden_states[1][0, :25], 2e-5)


def test_bad_input(small):
    upstream = Upstream(tiny.slim(**SHAPE))
    with pytest.raises(ValueError, match="at least one waveform"):
        upstream([])
    with pytest.raises(ValueError, match=r"Waveform 1 has shape \(2, 500\)"):
        upstream([WAVES[0], np.zeros((2, 500))])
    with pytest.raises(ValueError, match=r"Waveform 0 has shape \(399,\)"):
        upstream([np.zeros(399)])
    from jaxslim.spec import Spec

    with pytest.raises(ValueError, match="A bert model has no hidden states of audio"):
        Upstream(Slim(Spec(tiny_tasks.SPECS["bert"].config, "bert", "none"), {}))
