"""lowrank: exact at full rank in every family, errors as the spectra predict, budgets, recovery, bad input."""
import functools

import numpy as np
import pytest
import test_families
import tiny
import tiny_whisper

from jaxslim import hub
from jaxslim.data import Batches, CTCTask, load_rows
from jaxslim.methods import calibrate, factor
from jaxslim.methods.lowrank import LowRank
from jaxslim.models import bind
from jaxslim.slim import Slim, inputs
from jaxslim.spec import Spec, SpecError

ONE = dict(num_hidden_layers=1)
BERT = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=50,
            max_position_embeddings=40, dim=32, n_layers=1, n_heads=4, hidden_dim=48)
STABLE = dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True, mask_time_prob=0.0)
FAMILIES = {  # name: (family, head, changes, kinds, quick)
    "wav2vec2": ("wav2vec2", "ctc", dict(STABLE, num_hidden_layers=2), None, 1),
    "hubert": ("hubert", "ctc", {}, None, 0),
    "wavlm": ("wavlm", "ctc", dict(STABLE, num_buckets=20, max_bucket_distance=30), None, 1),
    "conformer": ("wav2vec2-conformer", "ctc", test_families.CONFORMER, None, 1),
    "conformer-rotary": ("wav2vec2-conformer", "ctc", dict(test_families.CONFORMER, position_embeddings_type="rotary"),
                         None, 0),
    "w2v-bert": ("wav2vec2-bert", "ctc", test_families.BERT, ("vo", "units", "up", "down"), 0),
    "w2v-bert-rotary": ("wav2vec2-bert", "ctc", dict(test_families.BERT, position_embeddings_type="rotary"), None, 0),
    "parakeet": ("parakeet_ctc", "ctc", {}, None, 0),
    "parakeet-biasless": ("parakeet_ctc", "ctc", dict(attention_bias=False, convolution_bias=False), None, 0),
    "bert": ("bert", "classification", dict(BERT, pad_token_id=0), None, 1),
    "roberta": ("roberta", "classification", dict(BERT, pad_token_id=1), None, 0),
    "distilbert": ("distilbert", "classification", BERT, None, 0),
    "whisper": ("whisper", "seq2seq", {}, None, 1),
}
NAMES = [pytest.param(n, id=n, marks=() if f[-1] else pytest.mark.slow) for n, f in FAMILIES.items()]
PLAIN = tiny.slim(**STABLE)


@functools.cache
def model(name):
    family, head, changes, *_ = FAMILIES[name]
    if family == "whisper":
        small = tiny_whisper.config(frames=24, encoder_layers=1, decoder_layers=1, vocab_size=40)
        return tiny.slim(Spec(small, "whisper", "seq2seq"))
    return tiny.slim(Spec(tiny.config(family, **{**ONE, **changes}), family, head))


def batch(name, seed=0):
    family = FAMILIES[name][0]
    if family == "whisper":
        mask = np.ones((2, 6), np.int32)
        mask[1, 4:] = 0
        ids = np.random.default_rng(seed).integers(0, 40, (2, 6)).astype(np.int32)
        return {"input_features": tiny_whisper.features(frames=24, seed=seed), "decoder_input_ids": ids,
                "decoder_attention_mask": mask}
    if family in ("bert", "roberta", "distilbert"):
        ids = np.random.default_rng(seed).integers(3, 50, (3, 12)).astype(np.int32)
        return {"input_ids": ids, "attention_mask": (np.arange(12) < np.array([[12], [7], [9]])).astype(np.int32)}
    if family in test_families.FEATURES:
        return test_families.feature_batch(test_families.FEATURES[family], (90, 57, 80), 3.0)
    values, mask = tiny.waves(2000, 1130, 1900, 900, seed=seed)
    return {"input_values": values, "attention_mask": mask}


def stream(name="wav2vec2", count=2):
    return lambda: iter([batch(name, seed) for seed in range(count)])


def method(name, **options):
    sides = ("encoder", "decoder") if name == "whisper" else ("encoder",)
    kinds = FAMILIES[name][3]
    return LowRank(**{"sides": sides, "sensitivity": "energy", **({"kinds": kinds} if kinds else {}), **options})


def answer(model, given):
    out = model(**given)
    values = np.asarray(out.logits if out.logits is not None else out.last_hidden_state)
    if "decoder_attention_mask" in given:
        return values[given["decoder_attention_mask"] == 1]
    return values if values.ndim == 2 or out.lengths is None else values[
        np.arange(values.shape[1]) < np.asarray(out.lengths)[:, None]]


@functools.cache
def analysed(name, twin="whitened"):
    return method(name, twin=twin).analyse(model(name), stream(name))


# ---- exactness ----


@pytest.mark.parametrize("name", NAMES)
def test_full_rank_changes_nothing(name):
    """Rotated, biases folded, all blocks at once: the same outputs; and the zeros of a dense cut are as good as the cut
    (which is what sensitivities rest on)."""
    teacher, (found, _, seen) = model(name), analysed(name)
    sides = {c.block.split(".")[0] for c in found}
    assert sides == ({"encoder", "decoder"} if name == "whisper" else {"encoder"})
    assert {c.kind for c in found} == set(FAMILIES[name][3] or ("qk", "vo", "units", "up", "down"))
    assert all(n > 10 for n in seen.frames.values())
    spec, params = teacher.spec, {k: np.asarray(v) for k, v in teacher.params.items()}
    given = batch(name, 7)
    want = answer(teacher, given)
    for c in found:
        if c.kind != "units":
            spec, params = c.cut(spec, params, c.full)
    tiny.close(answer(Slim(spec, params), given), want, 1e-5)
    bind.check(spec, params)
    spec, params, zeros = teacher.spec, teacher.params, teacher.params
    for c in found:
        if c.kind in ("qk", "vo", "units"):
            spec, params = c.cut(spec, {k: np.asarray(v) for k, v in params.items()}, c.full // 2)
            _, zeros = c.cut(teacher.spec, {k: np.asarray(v) for k, v in zeros.items()}, c.full // 2, True)
    small = answer(Slim(spec, params), given)
    assert np.abs(small - want).max() > 1e-3
    tiny.close(answer(Slim(teacher.spec, zeros), given), small, 2e-5)


@pytest.mark.parametrize("twin", ["product", "separate"])
def test_baselines_are_exact_at_full_rank_too(twin):
    teacher, (found, _, _) = model("wav2vec2"), analysed("wav2vec2", twin)
    assert {c.kind for c in found} == ({"qk", "vo"} if twin == "product" else set("qkvo")) | {"up", "down"}
    spec, params = teacher.spec, {k: np.asarray(v) for k, v in teacher.params.items()}
    for c in found:
        spec, params = c.cut(spec, params, c.full)
    tiny.close(answer(Slim(spec, params), batch("wav2vec2", 7)), answer(teacher, batch("wav2vec2", 7)), 1e-5)


def test_hedgehog_keeps_what_holds():
    from jaxslim.methods.linearize import Linearize

    linear = Linearize().start(PLAIN, None, None)
    with pytest.raises(SpecError, match="encoder.0.attention is hedgehog.*only V-O can be cut. Leave qk out"):
        LowRank(remove=0.1).start(linear, stream(), None)
    found, *_ = method("wav2vec2", kinds=("vo",)).analyse(linear, stream())
    spec, params = linear.spec, {k: np.asarray(v) for k, v in linear.params.items()}
    for c in found:
        spec, params = c.cut(spec, params, c.full)
    tiny.close(answer(Slim(spec, params), batch("wav2vec2", 7)), answer(linear, batch("wav2vec2", 7)), 1e-5)


# ---- errors as predicted ----


@functools.cache
def bundled(keep=2):
    """The first layers of the bundled teacher, and real speech: shape (clips, samples) a batch, all clips full."""
    name = "bundled:wav2vec2-ctc-en"
    teacher, task = hub.load(name), CTCTask.from_pretrained(hub.folder(name))
    spec = teacher.spec.replace(config={**teacher.spec.config, "num_hidden_layers": keep})
    teacher = Slim(spec, {k: v for k, v in teacher.params.items() if k in bind.shapes(spec)})
    rows = load_rows("bundled:prompts-en/train")
    some = Batches(rows, task, batch_size=16, buckets=(1.8,), min_seconds=1.2, max_seconds=1.8, epochs=1, shuffle=False,
                   max_skipped=1.0)
    given = [next(iter(some)) for _ in range(3)]
    some.close()
    return teacher, task, given


@functools.cache
def real_moments():
    teacher, _, given = bundled()
    return calibrate.calibrate(teacher, lambda: iter(given), {
        "encoder.1.attention": ("qk", "vo"), "encoder.1.ffn": ("units", "up", "down")}).moments


def heads(params, names, role, x, count):
    """A projection of x (frames, D) -> (H, frames, K), float64."""
    y = x @ np.asarray(params[f"{names[role]}.weight"], np.float64).T
    y = y + np.asarray(params.get(f"{names[role]}.bias", 0.0), np.float64)
    return y.reshape(len(x), count, -1).transpose(1, 0, 2)


def clips(teacher, given, block):
    """Inputs (frames, D) of an attention block, by clip."""
    out = []
    for batch in given:
        got = teacher(taps=(f"{block}.in",), **inputs(batch))
        out += [np.asarray(x, np.float64)[:n] for x, n in zip(got.taps[f"{block}.in"], np.asarray(got.lengths)) if n]
    return out


def score_error(teacher, student, block, xs):
    """Mean squared change of the scores less its mean over a row; query and key from different clips."""
    from jaxslim.models.roles import roles

    a, names = teacher.spec.attention(block), roles(teacher.spec, block)
    def scores(params, x, y):
        q, k = (heads(params, names, role, z, a.count) for role, z in (("q", x), ("k", y)))
        return q @ k.transpose(0, 2, 1) * a.scale
    total = pairs = 0.0
    for i, x in enumerate(xs):
        y = xs[(i + 7) % len(xs)]
        gap = scores(student.params, x, y) - scores(teacher.params, x, y)
        gap = gap - gap.mean(-1, keepdims=True)
        total, pairs = total + (gap**2).sum(), pairs + len(x) * len(y)
    return total / pairs


def test_errors_are_those_of_the_spectrum_and_half_those_of_the_plain_product():
    """On real speech: the squared error that a spectrum predicts, the measured one, and the baselines."""
    teacher, _, given = bundled()
    block, r = "encoder.1.attention", 24
    params = {k: np.asarray(v) for k, v in teacher.params.items()}
    seen = real_moments()[block]
    xs = clips(teacher, given, block)
    errors = {}
    for twin, centered in (("whitened", True), ("whitened", False), ("product", True)):
        qk, _ = factor.curves(teacher.spec, params, seen, block, ("qk", "vo"), twin, centered)
        errors[twin, centered] = score_error(teacher, Slim(*qk.cut(teacher.spec, params, r)), block, xs)
        if (twin, centered) == ("whitened", True):
            assert errors[twin, centered] == pytest.approx(qk.tail[r], rel=0.05)
    assert errors["whitened", True] < errors["whitened", False]
    assert 2 * errors["whitened", True] < errors["product", True]


@pytest.mark.parametrize("which, r", [("vo", 24), ("units", 256), ("down", 96), ("up", 96)])
def test_output_errors_are_as_predicted(which, r):
    """One block alone, fed with the teacher's inputs. V-O adds heads as if they were independent, `up` is linearized:
    these two are estimates, the others exact."""
    teacher, _, given = bundled()
    block = "encoder.1." + ("attention" if which == "vo" else "ffn")
    params = {k: np.asarray(v) for k, v in teacher.params.items()}
    curve, = factor.curves(teacher.spec, params, real_moments()[block], block, (which,))
    _, cut = curve.cut(teacher.spec, params, r, dense=True)
    total = frames = 0.0
    for batch in given:
        outs = [model(taps=(f"{block}.out",), **inputs(batch)) for model in (teacher, Slim(teacher.spec, cut))]
        total += float(((outs[0].taps[f"{block}.out"] - outs[1].taps[f"{block}.out"]) ** 2).sum())
        frames += int(outs[0].lengths.sum())
    assert total / frames == pytest.approx(curve.tail[r], rel={"vo": 0.5, "up": 0.5}.get(which, 0.03))
    assert 0 < curve.tail[r] < 0.5 * curve.tail[0] and (np.diff(curve.tail) <= 1e-9 * curve.tail[0]).all()


def test_neurons_are_chosen_by_what_they_explain():
    """Copies of neurons are dropped first and for free, whatever their size."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((500, 6))
    h = np.concatenate([base, 3 * base[:, :3], -base[:, 3:]], 1)                  # 12 neurons, 6 directions
    w, cov = rng.standard_normal((4, 12)), np.cov(h.T, bias=True)
    order, tail = factor.pivots(w, cov)
    assert sorted(order) == list(range(12)) and tail[6] < 1e-9 * tail[0] and tail[5] > 1e-3 * tail[0]
    kept = order[:4]
    rest = h - h.mean(0)
    fitted = np.linalg.lstsq(rest[:, kept], rest @ w.T, rcond=None)[0]
    assert tail[4] == pytest.approx((((rest[:, kept] @ fitted) - rest @ w.T) ** 2).sum(1).mean(), rel=1e-6)
