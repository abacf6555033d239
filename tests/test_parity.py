"""The JAX models against PyTorch transformers, and against themselves (padding, batching, blocked attention)."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxslim import hub
from jaxslim.models import attention

torch = pytest.importorskip("torch")


def reference(model, values, mask=None):
    with torch.no_grad():
        mask = None if mask is None else torch.from_numpy(mask)
        return model(torch.from_numpy(values), attention_mask=mask, output_hidden_states=True)


def imported(config, head, folder):
    model = tiny.torch_model(config, head)
    return model, hub.load(tiny.save(model, folder))


def same(have, want, head):
    """Every output within the tolerance; returns the largest ratio."""
    assert len(have.hidden_states) == len(want.hidden_states)
    ratios = [tiny.close(h, w) for h, w in zip(have.hidden_states, want.hidden_states)]
    pair = (have.logits, want.logits) if head == "ctc" else (have.last_hidden_state, want.last_hidden_state)
    return max(*ratios, tiny.close(*pair))


FLAGS = (False, True)
SWITCHES = [("wav2vec2", dict(feat_extract_norm=norm, do_stable_layer_norm=stable, conv_bias=bias))
            for norm, stable, bias in itertools.product(("group", "layer"), FLAGS, FLAGS)]
SWITCHES += [("hubert", dict(feat_extract_norm=norm, do_stable_layer_norm=stable, feat_proj_layer_norm=proj,
                             conv_pos_batch_norm=batch, conv_bias=proj != stable))
             for norm, stable, proj, batch in itertools.product(("group", "layer"), FLAGS, FLAGS, FLAGS)]
QUICK = {0, 3, 5, 6, 8, 15, 19, 21, 22}  # every pair of switches in every state; the others are slow tests


@pytest.mark.parametrize("i", [pytest.param(i, id="-".join([family, *(f"{k}={v}" for k, v in switches.items())]),
                                            marks=() if i in QUICK else pytest.mark.slow)
                               for i, (family, switches) in enumerate(SWITCHES)])
def test_all_switches(i, tmp_path):
    family, switches = SWITCHES[i]
    head = "none" if i % 4 == 3 else "ctc"
    config = tiny.config(family, **switches, num_conv_pos_embeddings=(16, 15)[i % 3 != 0])
    model, ours = imported(config, head, tmp_path)
    values, mask = tiny.waves(2000, 1130, 2000, fill=3.0)  # what a mask does not hide must leak in the same way
    for m in (mask, None)[: 1 + (i in (0, 3) or i not in QUICK)]:
        want = reference(model, values, m)
        have = ours(input_values=values, output_hidden_states=True, **({} if m is None else {"attention_mask": m}))
        assert same(have, want, head) < 2e-5  # the tolerance is 1e-4; what is reached is far below


LAYER = dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)  # a model that padding cannot touch


@pytest.mark.parametrize("stable", FLAGS)
def test_padding_garbage_changes_no_valid_frame(stable):
    ours = tiny.slim(**{**LAYER, "do_stable_layer_norm": stable})
    taps = ("frontend", "encoder.0.attention.in", "encoder.1.ffn.out", "encoder.1", "logits")
    outs = []
    for fill in (0.0, 50.0):
        values, mask = tiny.waves(2000, 700, 30, fill=fill)  # the last row is too short for one frame
        outs.append(ours(input_values=values, attention_mask=mask, output_hidden_states=True, taps=taps))
    clean, dirty = outs
    assert list(clean.lengths) == [50, 17, 0]
    for row, length in enumerate(clean.lengths):
        for a, b in zip((*clean.hidden_states, clean.logits), (*dirty.hidden_states, dirty.logits)):
            np.testing.assert_array_equal(a[row, :length], b[row, :length])
    for tap in taps:  # taps are zero where nothing is
        np.testing.assert_array_equal(clean.taps[tap], dirty.taps[tap])
        assert not np.any(clean.taps[tap][1, 17:]) and not np.any(clean.taps[tap][2])


def test_a_batch_of_eight_equals_eight_singles():
    ours = tiny.slim(**LAYER)
    lengths = (2000, 1130, 480, 2000, 1130, 480, 480, 2000)
    values, mask = tiny.waves(*lengths)
    together = ours(input_values=values, attention_mask=mask, output_hidden_states=True)
    for row, samples in enumerate(lengths):
        alone = ours(input_values=values[row : row + 1, :samples], output_hidden_states=True)
        frames = int(together.lengths[row])
        assert alone.logits.shape[1] == frames
        for a, b in zip((*together.hidden_states, together.logits), (*alone.hidden_states, alone.logits)):
            assert tiny.close(a[row, :frames], b[0]) < 2e-5


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_blocked_attention_and_convolutions_equal_dense(norm):
    ours = tiny.slim(feat_extract_norm=norm, do_stable_layer_norm=norm == "layer", num_conv_pos_embeddings=15)
    samples = (2 * attention.BLOCK + 40) * tiny.STRIDE
    values, mask = tiny.waves(samples, samples // 3)
    dense, blocked = (ours(input_values=values, attention_mask=mask, output_hidden_states=True, attention=kind)
                      for kind in ("dense", "blocked"))
    for a, b in zip((*blocked.hidden_states, blocked.logits), (*dense.hidden_states, dense.logits)):
        assert tiny.close(a, b) < 1e-5


def test_gradients_equal_pytorch(tmp_path):
    model, ours = imported(tiny.config(**LAYER, num_hidden_layers=1), "ctc", tmp_path)
    values, mask = tiny.waves(2000, 1130)

    def loss(params):
        logits = ours.replace(params=params)(input_values=values, attention_mask=mask).logits
        return (jax.nn.log_softmax(logits)[..., 3] ** 2).mean()

    grads = jax.grad(loss)(ours.params)
    logits = model(torch.from_numpy(values), attention_mask=torch.from_numpy(mask)).logits
    (torch.log_softmax(logits, -1)[..., 3] ** 2).mean().backward()
    want = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    assert set(grads) - set(want) == {"wav2vec2.masked_spec_embed"}  # takes part in training only
    largest = max(np.abs(g).max() for g in want.values())  # k_proj.bias has a gradient of 0 but for rounding
    for name, g in want.items():
        scale = max(np.abs(g).max(), 1e-2 * largest)
        tiny.close(np.asarray(grads[name]) / scale, g / scale)


@pytest.mark.parametrize("switches", [
    pytest.param(LAYER, id="layer", marks=pytest.mark.slow),
    pytest.param(dict(feat_extract_norm="group", attention_dropout=0.1, hidden_dropout=0.1, layerdrop=0.3,
                      mask_feature_prob=0.1), id="group")])
def test_gradients_are_finite_in_training(switches):
    ours = tiny.slim(**switches, mask_time_length=3, mask_feature_length=3, num_hidden_layers=1)
    values, mask = tiny.waves(2000, 1130, 30)  # the last row has no frame at all
    grads = jax.grad(lambda p: (ours.replace(params=p)(
        input_values=values * 1e3, attention_mask=mask, key=jax.random.key(0)).logits ** 2).mean())(ours.params)
    assert all(np.isfinite(g).all() for g in grads.values())
    assert sum(bool(jnp.any(g != 0)) for g in grads.values()) > 0.9 * len(grads)


@pytest.mark.parametrize("clips", [8, pytest.param(70, marks=pytest.mark.slow)])
def test_bundled_teacher_transcribes_as_pytorch(clips):
    import jiwer
    import transformers

    from jaxslim.data.rows import load_rows
    from jaxslim.data.tasks import CTCTask

    folder = hub.folder("bundled:wav2vec2-ctc-en")
    model = transformers.Wav2Vec2ForCTC.from_pretrained(folder).eval()  # as a user opens it: dtype from config.json
    ours, task, rows = hub.load(folder), CTCTask.from_pretrained(folder), load_rows("bundled:prompts-en/test")
    assert model.dtype == torch.float32 and len(rows) == 70
    order = sorted(range(len(rows)), key=rows.duration)[:clips]
    waves = {i: task.inputs(rows.audio(i)) for i in order}
    have = {}
    for group in (order[:30], order[30:55], order[55:])[: 1 if clips <= 30 else 3]:
        mask = np.zeros((len(group), max(len(waves[i]) for i in group)), np.int32)  # padded: 3 compilations, not 70
        values = np.zeros(mask.shape, np.float32)
        for row, i in enumerate(group):
            values[row, : len(waves[i])], mask[row, : len(waves[i])] = waves[i], 1
        out = ours(input_values=values, attention_mask=mask)
        best, lengths = np.asarray(out.logits.argmax(-1)), np.asarray(out.lengths)
        have |= {i: task.decode(best[row, : lengths[row]]) for row, i in enumerate(group)}
    want = {i: task.decode(reference(model, waves[i][None]).logits[0].argmax(-1).numpy()) for i in order}
    assert have == want
    truth = [rows[i]["text"] for i in order]
    assert jiwer.wer(truth, [have[i] for i in order]) == jiwer.wer(truth, [want[i] for i in order])
