"""generate: forced and free runs, what reads what, sizes, start, objectives; and that it learns."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_linearize import value
from test_step import setup

from jaxslim import config, cost, export, hub
from jaxslim.config import Group, Train
from jaxslim.data import Batches, CTCTask, load_rows
from jaxslim.methods import METHODS
from jaxslim.methods.generate import Generate, fidelity, generated, stop_at
from jaxslim.models import bind, roles
from jaxslim.slim import Slim, inputs
from jaxslim.spec import GENERATORS, Spec, SpecError
from jaxslim.train import mesh as M

OPTIONS = dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True, mask_time_prob=0.0,
               num_hidden_layers=3, conv_dim=[12, 16], conv_kernel=[10, 8], conv_stride=[5, 8],
               num_feat_extract_layers=2)
TEACHER = tiny.slim(**OPTIONS)
WAVES, MASK = tiny.waves(800, 500)
FRAMES = (19, 12)
BATCH = {"input_values": WAVES, "attention_mask": MASK}
KINDS = [*GENERATORS, "concat"]
SMALL = dict(hidden_size=24, num_attention_heads=4, num_hidden_layers=1, intermediate_size=40, vocab_size=11,
             conv_dim=[8, 6], conv_kernel=[10, 3], conv_stride=[5, 4], num_conv_pos_embeddings=7,
             num_conv_pos_embedding_groups=3, feat_extract_norm="layer", mask_time_prob=0.0)


def student(kind: str, **options) -> Slim:
    """A random student that generates the three layers of TEACHER."""
    method = Generate(student="previous" if kind == "concat" else kind, target_layers=(1, 2, 3),
                      inject="concat" if kind == "concat" else "add", **options)
    return tiny.slim(method.spec(TEACHER.spec), seed=3)


def states(model: Slim, **given) -> np.ndarray:
    """Generated layers (K, B, T, D)."""
    out = model(output_hidden_states=True, **{**BATCH, **given})
    return np.stack(out.hidden_states[-model.spec.generated:])


# ---- the model ----


@pytest.mark.parametrize("kind", KINDS)
def test_forced_equals_free_on_its_own_history(kind):
    model = student(kind, initial_layers=1, embedding=True)
    free = states(model)
    history = jnp.moveaxis(jnp.asarray(free[:-1]), 0, 1)
    tiny.close(states(model, history=history), free, 1e-5)
    if kind not in ("axial", "concat"):
        return
    mixed = states(model, history=0 * history, feed=np.array([True, True]))
    tiny.close(mixed, free, 1e-5)
    mixed = states(model, history=0.5 * history, feed=np.array([False, False]))
    tiny.close(mixed, states(model, history=0.5 * history), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_depends_on_no_later_one(kind):
    """Jacobian of every prediction by every layer of the history: zero from the layer itself on; of all earlier ones
    something, but in `previous` only of the last."""
    model = student(kind)
    history = jax.random.normal(jax.random.key(0), (1, 2, 19, 32))
    one = {"input_values": WAVES[:1]}

    def first(history):   # one number of each layer, at frame 5
        out = model(output_hidden_states=True, history=history, **one)
        return jnp.stack([h[0, 5].sum() for h in out.hidden_states[-3:]])

    jacobian = np.abs(jax.jit(jax.jacrev(first))(history)).sum((1, 4))              # (3, 2, T)
    reads = (jacobian.max(-1) > 0).tolist()
    previous = kind in ("previous", "concat")
    assert reads == [[False, False], [True, False], [not previous, True]]
    assert (jacobian[1, 0] > 0).all()     # all frames, before and after


@pytest.mark.parametrize("kind", GENERATORS)
def test_padding_changes_no_valid_frame(kind):
    model, outs = student(kind), []
    for fill in (0.0, 50.0):
        values, mask = tiny.waves(800, 500, 12, fill=fill)
        outs.append(states(model, input_values=values, attention_mask=mask))
    for row, frames in enumerate(FRAMES):
        np.testing.assert_array_equal(outs[0][:, row, :frames], outs[1][:, row, :frames])
    alone = states(model, input_values=values[1:2, :500], attention_mask=mask[1:2, :500])
    tiny.close(outs[0][:, 1, :12], alone[:, 0], 2e-5)
    assert np.isfinite(outs[0]).all()


@pytest.mark.slow
def test_remat_changes_no_gradient():
    model = student("axial")

    def loss(params, remat):
        return (model.replace(params=params)(output_hidden_states=True, remat=remat, key=jax.random.key(1),
                                             **BATCH).hidden_states[-1] ** 2).mean()

    grads = [jax.jit(jax.grad(loss), static_argnums=1)(model.params, remat) for remat in ("none", "full")]
    for name in model.params:
        tiny.close(grads[1][name], grads[0][name], 1e-5)
    inner = [k for k in model.params if ".generator." in k and "k_proj.bias" not in k]
    assert all(np.any(grads[0][k]) for k in inner)


def test_stopping_early_is_the_beginning_of_the_whole():
    model = student("full", embedding=True)
    short = stop_at(model, 2)
    np.testing.assert_allclose(states(short), states(model)[:2], rtol=1e-5, atol=1e-5)
    assert generated(short) == (1, 2) and cost.macs(short.spec, 1).total < cost.macs(model.spec, 1).total
    mixing = tiny.slim(model.spec.replace(head="classification", config={
        **model.spec.config, "use_weighted_layer_sum": True}))
    assert mixing.params["layer_weights"].shape == (4,)
    one = stop_at(mixing, 1)
    bind.check(one.spec, one.params)
    for steps in (0, 4):
        with pytest.raises(SpecError, match=f"stop_at: {steps} of 3 generated"):
            stop_at(model, steps)


@pytest.mark.parametrize("family", ["wav2vec2", "wavlm"])
@pytest.mark.parametrize("kind", KINDS)
def test_macs_equal_the_traced_program(family, kind):
    g = {"attention": "previous" if kind == "concat" else kind, "targets": [2, 5, 9], "layers": 2}
    g |= {"inject": "concat"} if kind == "concat" else {}
    for steps, layers, stable in ((0, 1, False), (2, 0, True)):
        spec = Spec({**SMALL, "num_hidden_layers": layers, "do_stable_layer_norm": stable}, family, "ctc",
                    {"generator": g | {"steps": steps}, "frontend.1": {"channels": 5}})
        counted = cost.macs(spec, 0.5, 2)
        assert counted.total == sum(counted.blocks.values()) == cost.traced_macs(spec, 0.5, 2)
        assert set(counted.blocks) == {*roles.blocks(spec), "projection", "positional"}
        assert cost.params(spec) == sum(x.size for x in bind.shapes(spec).values())
        assert cost.params_by_block(spec)["generator"] > 0


def test_published_sizes():
    """HuBERT and WavLM Base: what DistilHuBERT keeps, and one shared layer with its output."""
    base = {family: Spec({}, family) for family in ("hubert", "wavlm")}
    two = Generate(student="heads").spec(base["hubert"])
    assert cost.params(two) / 1e6 == pytest.approx(23.49, abs=0.005) and not two.blocks
    shared = Generate(student="previous").spec(base["wavlm"])
    assert cost.params(shared) / 1e6 == pytest.approx(16.99, abs=0.005)
    assert shared.generator.targets == (4, 8, 12)
    assert cost.params(shared) / cost.params(base["wavlm"]) == pytest.approx(0.18, abs=0.002)    # 82 % smaller
    heads = 3 * (768 * 768 + 768)
    assert 1 - cost.params(shared) / (cost.params(two) + heads) == pytest.approx(0.33, abs=0.005)  # 33 % fewer


def test_shardings():
    mesh = jax.sharding.AbstractMesh((1, 2, 2), M.AXES)
    P = jax.sharding.PartitionSpec
    params = student("concat", embedding=True).params
    where = {k.partition("generator.")[2]: M.spec_for(k, v.shape, mesh) for k, v in params.items() if "generator" in k}
    assert where["layers.0.attention.q_proj.weight"] == P("tensor", "fsdp")
    assert where["layers.0.feed_forward.output_dense.weight"] == P("fsdp", "tensor")
    assert where["output.weight"] == where["inject.weight"] == P(None, "fsdp")
    assert where["layer_embedding.weight"] == P()


def test_saved_and_read(tmp_path):
    model = student("axial", embedding=True)
    hub.save(model, tmp_path / "student")
    again = hub.load(tmp_path / "student")
    assert again.spec.generator == model.spec.generator and again.spec.blocks == model.spec.blocks
    assert again.params.keys() == model.params.keys()
    assert all(np.array_equal(again.params[k], model.params[k]) for k in model.params)
    inside = model.replace(spec=model.spec.with_block("generator.0.ffn", units=5))
    with pytest.raises(export.ExportError, match="Block generator.0.ffn, inside a generator, is changed"):
        export.export(inside, tmp_path / "hf", check=False)
    transformers = pytest.importorskip("transformers")
    with pytest.raises(Exception, match="trust_remote_code=True"):
        transformers.AutoModelForCTC.from_pretrained(tmp_path / "student")


@pytest.mark.parametrize("kind, family, options", [
    ("previous", "wav2vec2", {}),
    pytest.param("concat", "hubert", {"embedding": True}, marks=pytest.mark.slow),
    pytest.param("full", "wavlm", {"initial_layers": 1, "layers": 2}, marks=pytest.mark.slow),
    pytest.param("axial", "wav2vec2", {"skip": False}, marks=pytest.mark.slow)])
def test_exported_to_pytorch(kind, family, options, tmp_path):
    """The folder opens without jaxslim: outputs on a fixed input (export's own check), and every hidden state."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    stable = family != "hubert"
    teacher = Spec(tiny.config(family, **{**OPTIONS, "do_stable_layer_norm": stable}), family, "ctc")
    method = Generate(student="previous" if kind == "concat" else kind, target_layers=(1, 2, 3),
                      inject="concat" if kind == "concat" else "add", **options)
    model = stop_at(tiny.slim(method.spec(teacher), seed=3), 2)
    record = export.export(model, tmp_path / "hf")
    assert record["checked"] and record["trust_remote_code"] and record["relative_difference"] < 1e-4
    theirs = transformers.AutoModelForCTC.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    with torch.no_grad():
        out = theirs(input_values=torch.from_numpy(WAVES), attention_mask=torch.from_numpy(MASK).long(),
                     output_hidden_states=True)
    own = model(output_hidden_states=True, **BATCH)
    assert len(out.hidden_states) == len(own.hidden_states)
    for have, want in zip(out.hidden_states, own.hidden_states):
        tiny.close(have.numpy()[1, :12], want[1, :12])


@pytest.mark.parametrize("fields, message", [
    ({"attention": "all", "targets": [1]}, "attention 'all'; known are previous, full, axial"),
    ({"attention": "full", "targets": [2, 1]}, "ascending targets"), ({"attention": "full"}, "ascending targets"),
    ({"attention": "full", "targets": [1], "steps": 2}, "steps 2 of 1 targets"),
    ({"attention": "full", "targets": [1], "target": 2}, "no field 'target'. Did you mean 'targets'"),
    ({"attention": "previous", "targets": [1], "inject": "sum"}, "inject 'sum'")])
def test_a_generator_that_cannot_be(fields, message):
    with pytest.raises(SpecError, match=message):
        TEACHER.spec.with_block("generator", **fields)


def test_other_families_have_no_generator():
    spec = Spec(tiny.config("wav2vec2-conformer"), "wav2vec2-conformer", "ctc")
    with pytest.raises(SpecError, match="no block 'generator'"):
        bind.shapes(spec.with_block("generator", attention="full", targets=[1]))


# ---- the method ----


def test_start_takes_what_the_teacher_has():
    made = Generate(student="axial", initial_layers=1, layers=2).start(TEACHER, None, jax.random.key(0))
    bind.check(made.spec, made.params)
    encoder = "wav2vec2.encoder."
    assert made.spec["num_hidden_layers"] == 1 and made.spec.generator.targets == (1, 2, 3)
    copied = {"layers.0": "layers.0", "generator.layers.0": "layers.1", "generator.layers.1": "layers.2"}
    for have, want in copied.items():
        name = ".attention.q_proj.weight"
        assert made.params[encoder + have + name] is TEACHER.params[encoder + want + name]
    assert not np.any(made.params[encoder + "generator.output.weight"])
    assert made.params["lm_head.weight"] is TEACHER.params["lm_head.weight"]
    found = states(made)      # nothing is added yet: every layer is the features
    embedding = made(output_hidden_states=True, **BATCH).hidden_states[1]
    for layer in found:
        np.testing.assert_allclose(layer, embedding, rtol=1e-6)
    again = Generate(student="axial").start(made, None, None)     # a second stage trains it on
    assert again is made


def test_the_whole_chain_can_be_the_teacher():
    """Without skip and injection, a step is the teacher's own layer: the one that is shared, applied to its input."""
    method = Generate(student="previous", target_layers=(1,), inject="none", skip=False)
    made = method.start(TEACHER, None, None)
    want = TEACHER(taps=("encoder.0",), **BATCH).taps["encoder.0"]
    tiny.close(states(made)[0, 0], want[0], 1e-5)
    terms = value(Generate(**{**vars(method), "distance": "l1"}), made, TEACHER, BATCH)
    assert terms == {"layer.1": (pytest.approx(0.0, abs=1e-6), 1.0)}


def test_students_that_stay_stock_models(tmp_path):
    two = Generate(student="heads", initial_layers=2)
    made = two.start(TEACHER, None, None)
    assert generated(made) == (1, 2, 3) and not made.spec.blocks
    terms = value(two, made, TEACHER, BATCH)
    assert terms["layer.2"][0] == pytest.approx(np.log1p(np.exp(-1.0)), rel=1e-4)  # its last layer is the teacher's 2nd
    assert terms["layer.3"][0] > terms["layer.2"][0]
    thin = Generate(student="layers", width=16, ffn=24, distance="mse", target_layers=(0, 1, 2, 3))
    made = thin.start(TEACHER, None, jax.random.key(0))
    assert made.params["aux.distill.3.weight"].shape == (32, 16) and made.spec["num_hidden_layers"] == 3
    terms = value(thin, made, TEACHER, BATCH)
    assert set(terms) == {f"layer.{i}" for i in range(4)} and all(w == 0.25 for _, w in terms.values())
    same = Generate(student="layers", distance="l1", target_layers=(1, 2, 3))
    whole = value(same, same.start(TEACHER, None, None), TEACHER, BATCH)
    assert all(v == (pytest.approx(0.0, abs=1e-6), pytest.approx(1 / 3)) for v in whole.values())
    hub.save(thin.finish(made, None), tmp_path / "thin")
    assert hub.load(tmp_path / "thin").spec.blocks == {}


def test_terms_and_forcing():
    made = student("previous")
    method = Generate(target_layers=(1, 2, 3), gram_weight=0.1, logit_weight=0.5, target_weights=(1.0, 1.0, 2.0))
    forced = value(method, made, TEACHER, BATCH)
    assert {k: w for k, (_, w) in forced.items()} == {
        "layer.1": 0.25, "layer.2": 0.25, "layer.3": 0.5, "gram.1": pytest.approx(0.025),
        "gram.2": pytest.approx(0.025), "gram.3": pytest.approx(0.05), "kl": 0.5}

    (free,), (told,), (first, last) = (
        values_at(Generate(target_layers=(1, 2, 3), forcing=f, ramp_steps=10), made, steps)
        for f, steps in (("free", [0]), ("teacher", [0]), ("mixed", [0, 10])))
    assert first == pytest.approx(told, rel=1e-5) and last == pytest.approx(free, rel=1e-5)
    assert free[0] == pytest.approx(told[0], rel=1e-5) and abs(free[1] - told[1]) > 1e-3


def values_at(method, model, steps):
    """Values of all terms, for each step."""
    @jax.jit
    def terms(model, teacher, step):
        return method.loss(model, method.targets(teacher, BATCH, None, step), BATCH, None, step)

    return [[float(t.sum / t.count) for t in terms(model, TEACHER, jnp.int32(s)).values()] for s in steps]


def test_fidelity_is_of_free_and_forced_runs():
    made = student("full")
    rows = fidelity(made, TEACHER, [BATCH, BATCH])
    free, told = (values_at(Generate(student="full", target_layers=(1, 2, 3), forcing=f, distance="l1"), made, [0])[0]
                  for f in ("free", "teacher"))
    assert [r["layer"] for r in rows] == [1, 2, 3]
    assert [r["l1"] for r in rows] == pytest.approx(free, rel=1e-5)
    assert [r["forced_l1"] for r in rows] == pytest.approx(told, rel=1e-5)
    assert all(-1 <= r["cosine"] <= 1 and 0 <= r["cka"] <= 1 for r in rows)
    with pytest.raises(SpecError, match="no generative student"):
        fidelity(TEACHER, TEACHER, [])


def test_groups():
    names = list(student("previous").params)
    frozen = {n for n in names if Generate().group(n) == "frozen"}
    assert frozen == {n for n in names if "feature_extractor" in n or n.startswith("lm_head")}
    assert Generate(task_weight=1.0, freeze=()).group("lm_head.weight") == "main"


@pytest.mark.parametrize("options, message", [
    ({"target_layers": (2, 4)}, r"target_layers \[2, 4\] of .* 3 layers; .* numbers from 0 \(the embedding\) to 3"),
    ({"target_layers": (2, 1)}, r"target_layers \[2, 1\]"), ({"initial_layers": 3}, "3 initial_layers and 1 layers"),
    ({"student": "layers", "width": 18}, "width 18 is no multiple of the 4 heads"),
    ({"target_weights": (1.0,)}, "1 target_weights for 3 targets")])
def test_start_refuses(options, message):
    with pytest.raises(SpecError, match=message):
        Generate(**options).start(TEACHER, None, None)


def test_other_bad_input():
    with pytest.raises(SpecError, match="the teacher is a wav2vec2-conformer model; it must be one of wav2vec2"):
        Generate().start(tiny.slim(tiny.config("wav2vec2-conformer")), None, None)
    with pytest.raises(config.ConfigError, match="'sometimes' is none of"):
        config.build(METHODS["generate"], {"forcing": "sometimes"})
    made = student("previous")
    with pytest.raises(SpecError, match=r"generates \[1, 2, 3\], and target_layers are \[1\]"):
        Generate(target_layers=(1,)).start(made, None, None)
    with pytest.raises(SpecError, match=r"layers \[2\] are none"):
        value(Generate(target_layers=(1, 3)), made, TEACHER, BATCH)
    slow = tiny.slim(**{**OPTIONS, "conv_stride": [5, 16]})
    for forcing in ("teacher", "free"):
        with pytest.raises((SpecError, ValueError), match="frame rate"):
            value(Generate(target_layers=(1, 2, 3), forcing=forcing), made, slow, BATCH)


@pytest.mark.slow
def test_the_loss_falls_on_bundled_speech(tmp_path):
    """The bundled teacher and some clips: a dozen steps bring all generated layers nearer, also in free runs."""
    name = "bundled:wav2vec2-ctc-en"
    teacher, task = hub.load(name), CTCTask.from_pretrained(hub.folder(name))
    batches = Batches(load_rows("bundled:prompts-en/train")[:40], task, batch_size=4, buckets=(1.5,), max_seconds=1.5,
                      max_skipped=1.0)
    method = Generate(student="previous", target_layers=(2, 4), normalize=True)
    cfg = Train(groups={"main": Group(1e-3, schedule="constant")}, max_steps=12)
    begun = method.start(teacher, batches, jax.random.key(0))
    state, frozen, step = setup(method, begun, cfg)
    rows = [{k: v for k, v in next(batches).items() if k != "row"} for _ in range(3)]
    batches.close()
    losses = []
    for batch in rows * 4:
        state, metrics = step(state, frozen, teacher, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3]), losses
    made = method.finish(Slim(begun.spec, {**frozen, **state.params}), None)
    before, after = (fidelity(m, teacher, rows[:1], method) for m in (begun, made))
    assert all(b["l1"] > a["l1"] for b, a in zip(before, after, strict=True)), (before, after)
    hub.save(made, tmp_path / "student")
    assert hub.load(tmp_path / "student").fingerprint == made.fingerprint
    assert inputs(rows[0]).keys() == {"input_values", "attention_mask"}
