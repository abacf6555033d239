"""Text for language models: tokens in rows, bits per character, training from nothing, conversion by a recipe."""
import json
import math

import jax
import numpy as np
import pytest
import tiny

from jaxslim import causal, hub, perplexity, recipe
from jaxslim.cli import main
from jaxslim.config import ConfigError
from jaxslim.data import CausalTask, DataError, Rows, TokenBatches, load_rows
from jaxslim.data.language import write_tokenizer
from jaxslim.evaluate import evaluate
from jaxslim.spec import Spec

TEXTS = ["a lamp is a light", "", "a light is not a lamp", "it is a lämp", "not a light"] * 6
NEOX = dict(model_type="gpt_neox", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text file and a byte model trained on it for a few steps."""
    path = tmp_path_factory.mktemp("language")
    (path / "text.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    (path / "lm.yaml").write_text(json.dumps(dict(
        model=NEOX, vocabulary="bytes", data=dict(train=str(path / "text.txt"), validation=str(path / "text.txt")),
        output_dir=str(path / "run"), max_steps=12, per_device_train_batch_size=4, buckets=[16], eval_steps=12,
        groups=dict(main=dict(learning_rate=0.01)), mesh="data=1")))
    recipe.train(str(path / "lm.yaml"))
    return path


def task(tmp_path, kind="bytes", texts=TEXTS, size=None):
    count = write_tokenizer(tmp_path, kind, texts)
    return CausalTask.from_pretrained(tmp_path, Spec(NEOX | {"vocab_size": size or count}, "gpt_neox", "causal"))


@pytest.mark.parametrize("kind", ["bytes", "data"])
def test_tokenizers_give_texts_back_and_open_with_transformers(kind, tmp_path):
    from transformers import PreTrainedTokenizerFast

    texts = [" two  spaces\n\tand <lines> 漢字 é", "don't", *TEXTS]
    t = task(tmp_path, kind, texts)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in filter(None, texts):
        ids = t.encode(text)
        assert t.decode(ids) == text and t.end not in ids
        assert len(ids) == len(text.encode() if kind == "bytes" else text)
        assert theirs(text)["input_ids"] == ids.tolist() and theirs.eos_token_id == t.end == 0
    if kind == "data":
        with pytest.raises(DataError, match="has no token for"):
            t.encode("Ω")


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(DataError, match="has ids up to 256, but the model has 30 outputs"):
        task(tmp_path, size=30)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="no tokenizer.json"):
        CausalTask.from_pretrained(tmp_path, None)


def test_rows_hold_every_token_once(tmp_path):
    rows, t = Rows([{"text": text} for text in TEXTS]), task(tmp_path)
    batches = TokenBatches(rows, t, length=16, batch_size=3, shuffle=False, epochs=1, prefetch=0)
    stream = [0] + [i for text in TEXTS if text for i in [*t.encode(text), 0]]
    seen = [(int(x), int(y)) for b in batches for x, y, m in zip(*(b[k].ravel() for k in (
        "input_ids", "labels", "attention_mask"))) if y != -100]
    assert seen == list(zip(stream[:-1], stream[1:])) and batches.tokens == len(seen) == len(batches.owners)
    counts = np.bincount(batches.owners, minlength=len(rows))
    assert counts.tolist() == [len(text.encode()) + 1 if text else 0 for text in TEXTS]
    assert batches.skipped[0][1] == "no text" and "16 tokens" in batches.summary
    shuffled = TokenBatches(rows, t, length=16, batch_size=3, seed=1, epochs=1, prefetch=0)
    first = [next(shuffled)["input_ids"] for _ in range(2)][1]
    again = TokenBatches(rows, t, length=16, batch_size=3, seed=1, epochs=1, prefetch=0)
    next(again)
    resumed = TokenBatches(rows, t, length=16, batch_size=3, seed=1, epochs=1, prefetch=0)
    resumed.set_state(again.get_state())
    np.testing.assert_array_equal(next(resumed)["input_ids"], first)
    halves = [TokenBatches(rows, t, length=16, batch_size=4, multiple_of=2, seed=1, host=h, hosts=2, prefetch=0)
              for h in (0, 1)]
    whole = TokenBatches(rows, t, length=16, batch_size=4, multiple_of=2, seed=1, prefetch=0)
    np.testing.assert_array_equal(np.concatenate([next(h)["labels"] for h in halves]), next(whole)["labels"])


def test_bits_of_a_model_that_knows_nothing(tmp_path):
    """All weights zero: every token costs log2 of their number."""
    t = task(tmp_path)
    model = tiny.slim(Spec(NEOX | {"vocab_size": 257}, "gpt_neox", "causal"))
    model = model.replace(params=jax.tree.map(np.zeros_like, model.params))
    rows = Rows([{"text": "plain"}, {"text": "ä b"}])
    result = perplexity.bits(model, rows, t, batch_size=2, length=4, predictions=tmp_path / "bits.jsonl")
    each = math.log2(257)
    assert result["tokens"] == 6 + 5 and result["characters"] == 6 + 4 and result["perplexity"] == pytest.approx(257)
    assert result["bits_per_character"] == pytest.approx(11 * each / 10, rel=1e-5)
    saved = [json.loads(line) for line in (tmp_path / "bits.jsonl").read_text().splitlines()]
    assert [row["bits"] for row in saved] == pytest.approx([6 * each, 5 * each], rel=1e-4)
    other = perplexity.bits(model, rows, t, batch_size=1, length=7)
    assert other["bits_per_character"] == pytest.approx(result["bits_per_character"])


def test_training_from_nothing(folder, capsys):
    final = folder / "run/final"
    metrics = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    scores = [m["validation/bits_per_character"] for m in metrics if "validation/bits_per_character" in m]
    result = evaluate(str(final), str(folder / "text.txt"))
    assert scores and result["bits_per_character"] < 6.5 < math.log2(257)
    first = evaluate(str(folder / "run/initial"), str(folder / "text.txt"))
    assert first["bits_per_character"] == pytest.approx(
        math.log2(257) * result["tokens"] / result["characters"], rel=0.05)
    assert main(["eval", str(final), "--data", str(folder / "text.txt")]) == 0
    assert "bits per character" in capsys.readouterr().out
    assert main(["generate", str(final), "a lamp", "", "--max-new-tokens", "5", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    model, t = hub.load(final), CausalTask.from_pretrained(final, hub.load(final).spec)
    assert [r["prompt"] for r in rows] == ["a lamp", ""] and rows == causal.texts(model, t, ["a lamp", ""],
                                                                                  max_new_tokens=5)


@pytest.mark.slow
def test_conversion_by_a_recipe(folder):
    path = folder / "slim.yaml"
    data = dict.fromkeys(("train", "validation", "test"), str(folder / "text.txt"))
    train = dict(max_steps=3, per_device_train_batch_size=4, buckets=[16], mesh="data=1")
    path.write_text(json.dumps(dict(
        teacher=str(folder / "run/final"), data=data, bench_seconds=[], stages=[dict(
            name="cald", method="linearize", options=dict(mixer="mamba2", guidance="hybrid", until=2, keep=[0],
                                                          options=dict(chunk=8)), train=train)])))
    summary = recipe.run(str(path), str(folder / "slim"))
    student = hub.load(folder / "slim/final")
    assert [student.spec.attention(f"encoder.{i}.attention").mixer for i in (0, 1)] == ["softmax", "mamba2"]
    assert 0 < summary["student"]["bits_per_character"] < 9 and summary["control"]["bits_per_character"] > 0
    pair = summary["bits_student_minus_control"]
    assert pair["delta"] == pytest.approx(summary["student"]["bits_per_character"]
                                          - summary["control"]["bits_per_character"], abs=1e-3)
    assert "Bits per character" in (folder / "slim/report.html").read_text()


def test_saved_tokenizers_and_bad_names(folder, tmp_path):
    from jaxslim import scratch

    data = str(folder / "text.txt")
    made = scratch.create(NEOX, tmp_path / "a", data, 0, str(folder / "run/final"))
    assert hub.load(made).spec["vocab_size"] == 257
    assert hub.load(scratch.create(NEOX, tmp_path / "b", data, 0)).spec["vocab_size"] == 2 + len(set("".join(TEXTS)))
    with pytest.raises(ConfigError, match="characters of its texts"):
        scratch.create(dict(model_type="wav2vec2"), tmp_path / "c", data, 0, "bytes")
    assert len(load_rows(data)) == sum(bool(text) for text in TEXTS)
