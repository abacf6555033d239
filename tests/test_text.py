"""Texts with labels: table -> tokens -> batches -> a classifier that learns."""
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxslim import hub
from jaxslim.config import Group, Train
from jaxslim.data import DataError, TextBatches, TextTask, load_rows
from jaxslim.methods.finetune import Finetune
from jaxslim.slim import Slim, inputs
from jaxslim.spec import SpecError
from jaxslim.train import loop, losses

WORDS = "good fine great bad poor awful film song book the a was is and very not so it they say".split()
SMALL = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=30,
             max_position_embeddings=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("text") / "model")


def write_model(target):
    """A small BERT classifier with its tokenizer."""
    from transformers import BertConfig, BertTokenizerFast

    config = BertConfig(**SMALL, id2label={0: "negative", 1: "positive"}).to_dict()
    model = tiny.slim(config, "classification")
    ones = {k: jnp.ones_like(v) for k, v in model.params.items() if k.endswith("LayerNorm.weight")}
    hub.save(model.replace(params={**model.params, **ones}), target)
    vocabulary = target / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    tokens = {token: i for i, token in enumerate(vocabulary.read_text().split())}
    BertTokenizerFast(vocab=tokens).save_pretrained(target)
    return target


def table(path, count=60, seed=0, extra=()):
    rng = np.random.default_rng(seed)
    lines = ["text,label"]
    for i in range(count):
        positive = int(rng.integers(2))
        word = WORDS[int(rng.integers(3)) + (0 if positive else 3)]
        filler = [str(w) for w in rng.choice(WORDS[6:], int(rng.integers(2, 9)))]
        lines.append(" ".join([*filler, word, *filler[:2]]) + "," + (["negative", "positive"][positive] if i % 2 else
                                                                     str(positive)))
    (path / "data.csv").write_text("\n".join([*lines, *extra]) + "\n")
    return load_rows(path / "data.csv")


def take(batches, count):
    return [next(batches) for _ in range(count)]


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_task(folder):
    task = TextTask.from_pretrained(folder)
    ids = task.encode("the film was so good")
    assert ids.dtype == np.int32 and list(ids) == [2, 14, 11, 16, 21, 5, 3]
    assert len(task.encode("very " * 100)) == task.max_length == 24 and task.pad_id == 0
    assert (task.label("positive"), task.label(1), task.label("0"), task.decode(0)) == (1, 1, 0, "negative")
    for value, message in ((None, "no label"), ("", "no label"), ("neutral", "'neutral' is none of negative, positive"),
                           (2, "2 is none of"), (-1, "-1 is none of")):
        with pytest.raises(DataError, match=message):
            task.label(value)
    assert TextTask.from_pretrained(folder, max_length=10).max_length == 10


def test_folder_without_a_tokenizer(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(DataError, match="has no tokenizer; a text model needs one of tokenizer.json"):
        TextTask.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="no tokenizer that transformers can open"):
        TextTask.from_pretrained(tmp_path)


def test_every_row_once_an_epoch_and_nothing_is_lost(folder, tmp_path):
    task, rows = TextTask.from_pretrained(folder), table(tmp_path)
    batches = TextBatches(rows, task, batch_size=8, epochs=1, seed=1, buckets=3)
    seen, shapes = [], set()
    for batch in batches:
        assert {k: str(v.dtype) for k, v in batch.items()} == dict.fromkeys(
            ("input_ids", "attention_mask", "row", "labels"), "int32")
        shapes.add(batch["input_ids"].shape)
        for b, i in enumerate(batch["row"]):
            if i < 0:  # a filler row
                assert batch["labels"][b] == -100 and batch["attention_mask"][b].sum() == 1
                continue
            tokens = task.encode(rows[int(i)]["text"])
            np.testing.assert_array_equal(batch["input_ids"][b, : len(tokens)], tokens)
            assert batch["attention_mask"][b].sum() == len(tokens) and not batch["input_ids"][b, len(tokens):].any()
            assert batch["labels"][b] == task.label(rows[int(i)]["label"])
            seen.append(int(i))
    assert sorted(seen) == list(range(60)) and shapes == set(batches.shapes) and len(shapes) <= 3
    assert batches.buckets[-1] == max(len(task.encode(t)) for t in rows.column("text"))
    assert "60 of 60 rows" in batches.summary and 0 <= batches.padding_waste < 0.5


def test_resume_and_hosts(folder, tmp_path):
    task, rows = TextTask.from_pretrained(folder), table(tmp_path)
    make = lambda **more: TextBatches(rows, task, batch_size=8, seed=5, buckets=(8, 16), **more)  # noqa: E731
    one = make()
    take(one, 11)
    state = json.loads(json.dumps(one.get_state()))
    want = take(one, 5)
    other = make(prefetch=0)
    other.set_state(state)
    for a, b in zip(want, take(other, 5)):
        same(a, b)
    with pytest.raises(DataError, match="cannot be resumed"):
        TextBatches(rows, task, batch_size=4, seed=5).set_state(state)
    parts = [take(make(host=h, hosts=2), 4) for h in range(2)]
    for whole, *halves in zip(take(make(), 4), *parts):
        same(whole, {k: np.concatenate([h[k] for h in halves]) for k in whole})
    orders = [[b["row"].tolist() for b in TextBatches(rows, task, seed=s, epochs=1)] for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    for batches in (one, other):
        batches.close()


def test_rows_that_cannot_be_used(folder, tmp_path):
    task = TextTask.from_pretrained(folder)
    rows = table(tmp_path, extra=("a film,neutral", ",positive"))
    with pytest.raises(DataError, match="2 of 62 rows .* are unusable.*'neutral' is none of negative, positive"):
        TextBatches(rows, task, max_skipped=0.01)
    batches = TextBatches(rows, task)
    assert [reason for _, reason in batches.skipped] == ["label 'neutral' is none of negative, positive", "no text"]
    unlabelled = next(iter(TextBatches(rows, task, labels=False, shuffle=False, epochs=1, prefetch=0)))
    assert "labels" not in unlabelled
    with pytest.raises(DataError, match="multiple_of must be positive"):
        TextBatches(rows, task, multiple_of=0)
    with pytest.raises(DataError, match="over the largest bucket"):
        TextBatches(rows, task, buckets=(5,))


def test_cross_entropy():
    logits = np.array([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0], [9.0, 9.0, -9.0]], np.float32)
    term = losses.cross_entropy(logits, np.array([0, 2, -100]))
    want = np.log(np.exp(logits[0]).sum()) - 2.0 + np.log(3.0)
    assert float(term.count) == 2 and float(term.sum) == pytest.approx(want, rel=1e-6)
    frames = losses.cross_entropy(logits[None], np.array([[0, -100, -100]]))
    assert float(frames.count) == 1 and float(frames.sum) == pytest.approx(want - np.log(3.0), rel=1e-6)
    with pytest.raises(SpecError, match="no task loss"):
        encoder = tiny.slim(tiny.config(), "none")
        Finetune().loss(encoder, {}, {"input_values": tiny.waves(800)[0]}, None, 0)


def test_a_classifier_learns(folder, tmp_path):
    task, rows = TextTask.from_pretrained(folder), table(tmp_path, 120)
    test = table(tmp_path, 60, seed=9)
    cfg = Train(max_steps=80, per_device_train_batch_size=16, logging_steps=20, save_steps=80, seed=0,
                groups={"main": Group(learning_rate=1e-2, warmup_steps=5)})
    feed = TextBatches(rows, task, batch_size=16, buckets=(14,), seed=0)
    trained = loop.run(Finetune(), hub.load(folder), None, cfg, feed, str(tmp_path / "run"))
    feed.close()
    assert isinstance(trained, Slim)
    right, count = 0, 0
    for batch in TextBatches(test, task, buckets=(14,), epochs=1, shuffle=False):
        best = np.asarray(trained(**inputs(batch)).logits.argmax(-1))
        right, count = right + (best == batch["labels"]).sum(), count + (batch["labels"] >= 0).sum()
    assert count == 60 and right / count > 0.95
