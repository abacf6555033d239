"""Every kind of DATA becomes rows; every row is in one batch an epoch, or named; a resume is exact."""

import io
import itertools
import json
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import jaxslim.data
from jaxslim.data import AudioError, Batches, CTCTask, DataError, Extractor, Rows, audio, load_rows, suggest_buckets
from jaxslim.data.augment import speed_perturb
from jaxslim.data.joined import joined
from jaxslim.data.loader import Prefetch

sf = pytest.importorskip("soundfile")
PROMPTS = "bundled:prompts-en/"
VOCABULARY = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz'"])}
TASK = CTCTask(VOCABULARY)


def wav(seconds=0.3, seed=0, rate=16000):
    wave, out = 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate)), io.BytesIO()
    sf.write(out, wave, rate, format="WAV")
    return out.getvalue()


def some_rows(n=23, **change):
    """Clips of 0.1 to 1.2 s; `change` maps an index (as _3) to another row."""
    records = [
        {"id": f"r{i}", "audio": wav(0.1 + 0.05 * i, i), "text": "abc " * (1 + i % 7), "duration": 0.1 + 0.05 * i}
        for i in range(n)
    ]
    for i, row in change.items():
        records[int(i[1:])].update(row)
    return Rows(records, "test rows")


def collect(batches):
    return [{k: v.copy() for k, v in batch.items()} for batch in batches]


def equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a.keys() == b.keys()
        for k in a:
            np.testing.assert_array_equal(a[k], b[k])


# ---- rows ----


@pytest.mark.parametrize("part, n", [("train", 401), ("validation", 35), ("test", 70)])
def test_bundled_prompts(part, n):
    rows = load_rows(PROMPTS + part)
    assert len(rows) == n and {"id", "audio", "text", "speaker", "language", "duration"} <= set(rows.columns)
    for i in range(0, n, max(n // 8, 1)):
        wave = rows.audio(i)
        assert wave.dtype == np.float32 and len(wave) / 16000 == pytest.approx(rows.duration(i), abs=1e-3)
        assert 0.01 < wave.std() < 0.5
    assert rows[0]["audio"]["bytes"][:4] == b"OggS" and rows[0]["text"] == rows.column("text")[0]
    assert TASK.decode(TASK.encode(rows[-1]["text"]), collapse=False) == rows[-1]["text"]


@pytest.fixture
def kinds(tmp_path):
    """The same three clips and texts as every kind of DATA: {kind: DATA}."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts, clips = ["one", "two, three", 'four "five"'], [wav(0.2 + 0.1 * i, i) for i in range(3)]
    for name in ("folder", "jsonl/wavs", "cv/clips", "hub/data"):
        (tmp_path / name).mkdir(parents=True)
    for i, clip in enumerate(clips):
        for name in ("folder", "jsonl/wavs", "cv/clips"):
            (tmp_path / name / f"{i}.wav").write_bytes(clip)
    names = [f"{i}.wav" for i in range(3)]
    table = pa.table({"audio": [{"bytes": c, "path": n} for c, n in zip(clips, names)], "sentence": texts})
    pq.write_table(table, tmp_path / "struct.parquet")
    pq.write_table(table, tmp_path / "hub/data/train-00000-of-00001.parquet")
    pq.write_table(pa.table({"audio": clips, "text": texts}), tmp_path / "binary.parquet")
    paths = [{"bytes": None, "path": f"folder/{n}"} for n in names]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"audio": pa.array(paths, kind), "text": texts}), tmp_path / "pointer.parquet")
    pq.write_table(pa.table({"path": [f"folder/{n}" for n in names], "transcript": texts}), tmp_path / "path.parquet")
    quoted = ['"' + t.replace('"', '""') + '"' for t in texts]
    (tmp_path / "folder/metadata.csv").write_text(
        "file_name,transcription\n" + "".join(f"{n},{t}\n" for n, t in zip(names, quoted))
    )
    lines = [{"audio_filepath": f"wavs/{n}", "duration": 0.2 + 0.1 * i, "text": texts[i]} for i, n in enumerate(names)]
    (tmp_path / "jsonl/nemo.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / "cv/train.tsv").write_text(
        "client_id\tpath\tsentence\tup_votes\n" + "".join(f"x\t{n}\t{t}\t2\n" for n, t in zip(names, texts))
    )
    (tmp_path / "absolute.csv").write_text(
        "\ufeffwav,text\r\n" + "".join(f"{tmp_path}/folder/{n},{t}\r\n" for n, t in zip(names, quoted))
    )
    return {
        "parquet struct": tmp_path / "struct.parquet", "parquet binary": tmp_path / "binary.parquet",
        "parquet pointer": tmp_path / "pointer.parquet",
        "parquet path": tmp_path / "path.parquet", "folder": tmp_path / "folder", "nemo": tmp_path / "jsonl/nemo.jsonl",
        "common voice": tmp_path / "cv/train.tsv", "csv": tmp_path / "absolute.csv",
        "parquet folder": tmp_path / "hub/data", "hf": f"hf:{tmp_path}/hub",
    }  # fmt: skip


KINDS = [
    "parquet struct",
    "parquet binary",
    "parquet path",
    "parquet pointer",
    "folder",
    "nemo",
    "common voice",
    "csv",
    "parquet folder",
    "hf",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data(kinds, kind):
    if kind == "hf":
        pytest.importorskip("datasets")
    rows = load_rows(str(kinds[kind]))
    assert rows.column("text") == ["one", "two, three", 'four "five"']
    for i in range(3):
        assert rows.duration(i) == pytest.approx(0.2 + 0.1 * i)
        np.testing.assert_array_equal(rows.audio(i), audio.load(wav(0.2 + 0.1 * i, i)))
    assert all(rows.column("id")) and len(set(rows.column("id"))) == 3
    assert len(load_rows(str(kinds[kind]), limit=2)) == 2


def test_hf_names(kinds, monkeypatch):
    datasets, pa = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    asked = []

    def load_dataset(name, config=None, split=None):
        asked.append((name, config, split))
        rows = {"audio": [{"bytes": wav(), "path": None}], "text": ["a"], "label": [1]}
        kind = {
            "audio": datasets.Audio(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["n", "y"]),
        }
        table = datasets.Dataset(pa.table(rows)).cast(datasets.Features(kind))
        return table if split else datasets.DatasetDict({"train": table, "test": table})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for given in ("hf:owner/name:clean/train.100", "hf:owner/name/test", "owner/name/test", "hf:name:/test"):
        rows = load_rows(given)
        assert rows.audio(0).shape == (4800,) and rows[0]["label"] == "y"
    named = ("owner/name", None, "test")
    assert asked == [("owner/name", "clean", "train.100"), named, named, ("name", None, "test")]
    with pytest.raises(DataError, match=r"has the splits train, test; choose one as hf:owner/name:default/SPLIT"):
        load_rows("hf:owner/name")


def test_joined_and_weighted(kinds):
    rows = load_rows(f"{kinds['nemo']} + 3*{kinds['folder']}")
    assert len(rows) == 12 and rows.column("text")[3:6] == rows.column("text")[9:12]
    assert rows.column("duration")[:4] == [0.2, pytest.approx(0.3), 0.4, None]
    for wrong in ("0.5*", "0*", "+"):
        with pytest.raises(DataError):
            load_rows(f"{kinds['nemo']}+{wrong}{kinds['folder']}")
    plus = kinds["nemo"].parent / "a+b.jsonl"
    plus.write_text(kinds["nemo"].read_text())
    assert len(load_rows(str(plus))) == 3


@pytest.mark.parametrize("audio_name", ["audio", "audio_filepath", "file_name", "path", "wav", "file"])
@pytest.mark.parametrize("text_name", ["text", "sentence", "transcription", "transcript", "normalized_text"])
def test_aliases(tmp_path, audio_name, text_name):
    (tmp_path / "a.wav").write_bytes(wav())
    (tmp_path / "m.jsonl").write_text(json.dumps({audio_name: "a.wav", text_name: "hello", "speaker": "s"}))
    rows = load_rows(str(tmp_path / "m.jsonl"))
    assert rows[0]["text"] == "hello" and rows[0]["id"] == "a" and rows[0]["speaker"] == "s"
    assert rows.audio(0).shape == (4800,) and set(rows.columns) == {"id", "audio", "text", "speaker"}


def test_chosen_columns_and_text_only(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("gloss,label\na ski tow,noun.artifact\n")
    rows = load_rows(str(table), text_column="gloss")
    assert rows.columns == ("text", "label", "id") and rows[0]["audio"] is None and rows[0]["id"] == "row 0"
    with pytest.raises(AudioError, match="Row 'row 0' of .*t.csv has no audio"):
        rows.audio(0)
    with pytest.raises(DataError, match="has no column 'txt'; it has gloss, label"):
        load_rows(str(table), text_column="txt")
    with pytest.raises(DataError, match="neither audio nor text; expected a column audio or .* found gloss, label"):
        load_rows(str(table))


def test_chosen_audio_column_is_relative_to_the_manifest(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav())
    text = "line\u2028separator"  # str.splitlines would cut the JSON here
    (tmp_path / "m.jsonl").write_text(json.dumps({"recording": "a.wav", "text": text}, ensure_ascii=False), "utf-8")
    rows = load_rows(str(tmp_path / "m.jsonl"), audio_column="recording")
    assert rows.audio(0).shape == (4800,) and rows[0]["text"] == text


def test_nemo_offsets(tmp_path):
    (tmp_path / "long.wav").write_bytes(wav(2.0))
    lines = [{"audio_filepath": "long.wav", "offset": o, "duration": 0.5, "text": "a"} for o in (0, 0.5, 1.75, 3)]
    (tmp_path / "m.json").write_text("\n".join(map(json.dumps, lines)))
    rows, whole = load_rows(str(tmp_path / "m.json")), audio.load(tmp_path / "long.wav")
    np.testing.assert_array_equal(rows.audio(1), whole[8000:16000])
    assert [len(rows.audio(i)) for i in range(3)] == [8000, 8000, 4000] and rows.duration(1) == 0.5
    with pytest.raises(AudioError, match="shorter than the row's offset of 3 s"):
        rows.audio(3)


def test_broken_tables_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    files = {
        "x.parquet": (b"not parquet", "x.parquet is not a readable Parquet file"),
        "lfs.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        "x.jsonl": (b'{"audio": "a.wav"}\n{oops\n', "x.jsonl line 2 is not valid JSON"),
        "list.jsonl": (b"[1, 2]\n", "line 1 is not a JSON object"),
        "x.tsv": (b"path\tsentence\na.wav\n", "x.tsv line 2 has not the 2 columns"),
        "none.csv": (b"path,sentence\n", "has no rows"),
        "latin.csv": ("path,text\na.wav,caf\u00e9\n".encode("latin-1"), "not UTF-8"),
        "x.wav": (wav(), "is not a data table; expected .parquet"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message) as error:
            load_rows(str(tmp_path / name))
        assert "\n" not in str(error.value)
    for given, message in {
        str(tmp_path / "empty"): "no metadata.csv",
        str(tmp_path / "nowhere.jsonl"): "does not exist",
        "bundled:prompts-xx/train": "is not bundled; there is bundled:prompts-en/test",
        "gs2://bucket/a.parquet": "no reader for gs2://",
    }.items():
        with pytest.raises(DataError, match=message):
            load_rows(given)


def test_rows_are_a_sequence_with_a_fingerprint(kinds):
    rows = load_rows(str(kinds["parquet struct"]))
    assert rows[1:].column("text") == rows.column("text")[1:] and len(rows + rows) == 6 and rows[-1] == [*rows][-1]
    assert rows.fingerprint == load_rows(str(kinds["parquet struct"])).fingerprint != rows[1:].fingerprint
    assert load_rows(str(kinds["nemo"])).fingerprint != load_rows(str(kinds["folder"])).fingerprint


# ---- task ----


def save_task(folder, vocabulary=VOCABULARY, features="preprocessor_config.json", **tokenizer):
    folder.mkdir(exist_ok=True)
    options = {"do_normalize": False, "return_attention_mask": False, "sampling_rate": 8000}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Wav2Vec2CTCTokenizer", **tokenizer}))
    nested = {"feature_extractor": options} if features == "processor_config.json" else options
    (folder / features).write_text(json.dumps(nested))
    return folder


UPPER = {k.upper() if len(k) == 1 else k: v for k, v in VOCABULARY.items()}
OTHER = {("_" if k == "|" else "[PAD]" if k == "<pad>" else k): v for k, v in VOCABULARY.items()} | {"sch": 40}


@pytest.mark.parametrize(
    "vocabulary, options",
    [
        (VOCABULARY, {}),
        (UPPER, {"do_lower_case": True}),
        (OTHER, {"word_delimiter_token": "_", "pad_token": "[PAD]"}),
        ({"eng": VOCABULARY, "deu": UPPER}, {"target_lang": "eng"}),
    ],
)
def test_characters_as_in_transformers(tmp_path, vocabulary, options):
    transformers = pytest.importorskip("transformers")
    folder = save_task(tmp_path / "m", vocabulary, **options)
    task, theirs = CTCTask.from_pretrained(folder), transformers.Wav2Vec2CTCTokenizer(folder / "vocab.json", **options)
    for text in [
        "hello world",
        "it's a test",
        "a",
        "preschool meschugge",
        "aab b c",
        *load_rows(PROMPTS + "test").column("text"),
    ]:
        assert task.encode(text).tolist() == theirs(text).input_ids
        assert task.decode(task.encode(text), collapse=False) == text
    assert task.blank_id == theirs.pad_token_id
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = np.repeat(rng.choice([*task.vocabulary.values()], 30), rng.integers(1, 4, 30))
        assert task.decode(ids) == theirs.decode(ids)
    assert task.decode([*task.encode("ab"), -100, -100], collapse=False) == "ab"


@pytest.mark.parametrize("features", ["preprocessor_config.json", "processor_config.json"])
def test_features_are_read_from_either_file(tmp_path, features):
    task = CTCTask.from_pretrained(save_task(tmp_path / "m", features=features))
    assert task.extractor == Extractor("values", 8000, False, False)
    wave = np.ones(5, np.float32)
    np.testing.assert_array_equal(task.inputs(wave), wave)


def test_bundled_teacher_reads_the_prompts():
    folder = pathlib.Path(jaxslim.data.__file__).parents[2] / "checkpoints/wav2vec2-ctc-en"
    if not folder.exists():
        pytest.skip("not in a checkout")
    task = CTCTask.from_pretrained(folder)
    assert dict(task.vocabulary) == VOCABULARY and task.extractor == Extractor()
    for part in ("train", "validation", "test"):
        for text in load_rows(PROMPTS + part).column("text"):
            assert task.decode(task.encode(text), collapse=False) == text


def test_unknown_characters_are_listed():
    with pytest.raises(DataError, match="characters outside the vocabulary: '4' 'é' in 'café 44'") as error:
        TASK.encode("café 44")
    assert error.value.characters == ("4", "é")
    np.testing.assert_array_equal(TASK.encode("Hello\n World "), TASK.encode("hello world"))
    np.testing.assert_array_equal(CTCTask(UPPER).encode("hello world"), TASK.encode("hello world"))


def test_wrong_vocabulary_is_named(tmp_path):
    with pytest.raises(DataError, match="has no vocab.json"):
        CTCTask.from_pretrained(tmp_path)
    folder = save_task(tmp_path / "m")
    (folder / "config.json").write_text('{"vocab_size": 20}')
    with pytest.raises(DataError, match="ids up to 31, but the model has 20 outputs"):
        CTCTask.from_pretrained(folder)
    for name, content, message in [
        ("vocab.json", "{", "vocab.json is not valid JSON"),
        ("vocab.json", "[1]", "must hold a JSON object"),
        ("vocab.json", '{"<pad>": 0, "a": 1}', "no word delimiter token '|'"),
        ("vocab.json", '{"<pad>": 0, "|": 0}', "its own non-negative integer"),
        ("vocab.json", '{"|": 0, "a": 1}', r"no pad \(blank\) token '<pad>'"),
        ("tokenizer_config.json", '{"tokenizer_class": "WhisperTokenizer"}', "uses the tokenizer WhisperTokenizer"),
        ("tokenizer_config.json", '{"target_lang": "fra"}', "no language 'fra'"),
    ]:
        folder = save_task(tmp_path / "m")
        (folder / name).write_text(content)
        with pytest.raises(DataError, match=message.replace("|", r"\|")):
            CTCTask.from_pretrained(folder)
    folder = save_task(tmp_path / "m")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match="neither preprocessor_config.json nor"):
        CTCTask.from_pretrained(folder)


# ---- batches ----


def test_shapes_padding_and_fillers():
    rows = some_rows()
    batches = Batches(rows, TASK, batch_size=5, buckets=(0.5, 1.2), epochs=1, multiple_of=2)
    assert batches.shapes == [(4, 8000, 32), (4, 19200, 32)] and batches.buckets == (0.5, 1.2)
    got = collect(batches)
    assert len(got) == len(batches) == 7
    for batch in got:
        size, samples, width = next(s for s in batches.shapes if s[1] == batch["input_values"].shape[1])
        assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
            "input_values": ((size, samples), "float32"), "attention_mask": ((size, samples), "int32"),
            "labels": ((size, width), "int32"), "row": ((size,), "int32"), "samples": ((size,), "int32"),
        }  # fmt: skip
        for b, i in enumerate(batch["row"]):
            wave = TASK.inputs(rows.audio(i)) if i >= 0 else np.zeros(0)
            labels = TASK.encode(rows[i]["text"]) if i >= 0 else []
            np.testing.assert_array_equal(batch["input_values"][b], np.pad(wave, (0, samples - len(wave))))
            np.testing.assert_array_equal(batch["attention_mask"][b], np.arange(samples) < len(wave))
            np.testing.assert_array_equal(batch["labels"][b], [*labels, *[-100] * (width - len(labels))])
    assert sum((b["row"] < 0).sum() for b in got) == 7 * 4 - len(rows)
    waste = 1 - sum(b["attention_mask"].sum() for b in got) / sum(b["input_values"].size for b in got)
    assert batches.padding_waste == pytest.approx(waste, abs=1e-4)


BAD = {
    "_2": {"audio": b"nonsense", "duration": 0.2}, "_3": {"audio": b"nonsense", "duration": None},
    "_4": {"audio": wav(0.01), "duration": None}, "_5": {"text": "50 %"}, "_6": {"text": None},
    "_7": {"audio": "/nowhere/x.wav", "duration": None}, "_8": {"audio": wav(1.5), "duration": 0.5},
    "_9": {"audio": None}, "_10": {"audio": wav(0.01), "duration": 0.6},
}  # fmt: skip


OPTIONS = [
    {}, {"batch_size": 3}, {"batch_seconds": 2.0}, {"prefetch": 0, "workers": 0}, {"buckets": 2}, {"shuffle": False},
    {"max_seconds": 1.0, "min_seconds": 0.2},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_each_row_once_an_epoch_or_named(options):
    rows = some_rows(**BAD)
    batches = Batches(rows, TASK, max_skipped=1.0, epochs=3, **options)
    epochs = [[] for _ in range(3)]
    for batch in batches:
        state = batches.get_state()
        epochs[state["epoch"] - (state["batch"] == 0)].extend(batch["row"][batch["row"] >= 0].tolist())
    names, skipped = rows.column("id"), dict(batches.skipped)
    for seen in epochs:
        assert sorted([names[i] for i in seen] + list(skipped)) == sorted(names)
    if "max_seconds" not in options:
        assert set(skipped) == {f"r{i}" for i in range(2, 11)}
        reasons = {
            "r2": "not readable", "r3": "not readable", "r4": "10 ms long", "r5": "'%' '0' '5'", "r6": "no text",
            "r7": "No such file", "r8": "1.500 s of audio", "r9": "has no audio", "r10": "0.010 s",
        }  # fmt: skip
        for name, reason in reasons.items():
            assert reason in skipped[name]
        assert "9 rows skipped: r2: r2 (bytes in test rows) is not readable" in batches.summary
    else:
        assert "outside min_seconds" in skipped["r0"] and "outside min_seconds" in skipped["r22"]


def test_too_many_bad_rows_stop():
    with pytest.raises(
        DataError, match=r"4 of 23 rows of test rows are unusable, more than max_skipped = 0.05 allows: r4: 10 ms"
    ):
        Batches(some_rows(**{k: BAD[k] for k in ("_4", "_5", "_6", "_9")}), TASK)
    late = Batches(some_rows(_2=BAD["_2"], _8=BAD["_8"]), TASK, batch_size=4)
    with pytest.raises(DataError, match="2 of 23 rows"):
        for _ in range(40):
            next(late)
    asked = Batches(some_rows(), TASK, max_seconds=0.3)  # on purpose: not held against max_skipped
    assert len(asked.skipped) == 23 - 5
    with pytest.raises(DataError, match="has no usable row: r0: 0.100 s long, outside"):
        Batches(some_rows(), TASK, min_seconds=9)
    with pytest.raises(DataError, match="Row 'r5' of test rows: characters outside the vocabulary"):
        Batches(some_rows(_5=BAD["_5"]), TASK, unknown="error")
    with pytest.raises(DataError, match="over the largest bucket"):
        Batches(some_rows(), TASK, buckets=(0.5,))


def test_unlabelled_data():
    rows = some_rows(_1={"text": None})
    assert all("labels" not in b for b in Batches(rows, TASK, labels=False, epochs=1))


def test_order_depends_on_seed_and_epoch_only():
    rows = some_rows()
    twice = collect(Batches(rows, TASK, batch_size=4, epochs=2, seed=1))
    equal(twice, collect(Batches(rows, TASK, batch_size=4, epochs=2, seed=1, prefetch=0, workers=0, cache_bytes=0)))
    first, second = twice[: len(twice) // 2], twice[len(twice) // 2 :]
    assert [b["row"].tolist() for b in first] != [b["row"].tolist() for b in second]
    other = collect(Batches(rows, TASK, batch_size=4, epochs=1, seed=2))
    assert [b["row"].tolist() for b in first] != [b["row"].tolist() for b in other]
    straight = [b["row"].tolist() for b in Batches(rows, TASK, batch_size=4, epochs=1, shuffle=False)]
    assert [i for row in straight for i in row if i >= 0] == list(range(23))


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 5, 6, 7, 13])
def test_exact_resume(taken, prefetch):
    rows, augment = some_rows(_2=BAD["_2"]), speed_perturb()
    options = dict(batch_size=4, seed=3, augment=augment, prefetch=prefetch, buckets=4)
    whole = Batches(rows, TASK, epochs=3, **options)
    expected = collect(whole)
    cut = Batches(rows, TASK, epochs=3, **options)
    for _ in range(taken):
        next(cut)
    state = json.loads(json.dumps(cut.get_state()))
    next(cut)  # work done after the checkpoint is forgotten
    again = Batches(rows, TASK, epochs=3, **options)
    again.set_state(state)
    assert again.get_state() == state
    equal(collect(again), expected[taken:])
    cut.set_state(state)  # and in the same process
    equal(collect(cut), expected[taken:])


def test_resume_refuses_other_data():
    state = Batches(some_rows(), TASK, batch_size=4).get_state()
    for rows, options in [(some_rows(22), {}), (some_rows(), {"seed": 1}), (some_rows(), {"buckets": 2})]:
        with pytest.raises(DataError, match="cannot be resumed where it stood"):
            Batches(rows, TASK, batch_size=4, **options).set_state(state)


@pytest.mark.parametrize("hosts, multiple_of", [(2, 2), (2, 1), (3, 1), (4, 4)])
def test_hosts_share_the_same_global_batches(hosts, multiple_of):
    rows, options = (
        some_rows(_2=BAD["_2"]),
        dict(batch_size=5, multiple_of=multiple_of, epochs=2, augment=speed_perturb()),
    )
    alone = collect(Batches(rows, TASK, **options))
    parts = [collect(Batches(rows, TASK, host=h, hosts=hosts, **options)) for h in range(hosts)]
    for whole, *shares in zip(alone, *parts, strict=True):
        assert len({s["row"].shape for s in shares}) == 1  # every process has the same shape
        for k, v in whole.items():
            joined = np.concatenate([s[k] for s in shares])
            np.testing.assert_array_equal(joined[: len(v)], v)
            assert k != "row" or (joined[len(v) :] == -1).all()


def test_calling_gives_an_independent_pass_and_a_finished_one_starts_again():
    batches = Batches(some_rows(), TASK, batch_size=4)
    next(batches)
    state, once = batches.get_state(), batches()
    first = collect(once)
    assert len(first) == len(batches) and batches.get_state() == state
    equal(collect(once), first)


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_prompts_padding_waste(part):
    for options in ({"batch_size": 8}, {"batch_seconds": 40}):
        batches = Batches(load_rows(PROMPTS + part), TASK, **options)
        assert batches.padding_waste < 0.10 and len(batches.shapes) <= 16 and not batches.skipped
    assert len(Batches(load_rows(PROMPTS + part), TASK, buckets=4).shapes) == 4


def test_suggest_buckets_is_optimal_and_covers():
    lengths = np.round(np.random.default_rng(0).gamma(2, 1.5, 12) + 0.3, 2)
    ends = np.unique(np.ceil(lengths / 0.02 - 1e-6) * 0.02)
    for n in (1, 2, 3, 4):
        best = min(
            sum(min(e for e in (*chosen, ends[-1]) if e >= x - 1e-9) for x in lengths)
            for chosen in itertools.combinations(ends[:-1], n - 1)
        )
        got = suggest_buckets(lengths, n)
        assert sum(min(e for e in got if e >= x - 1e-9) for x in lengths) == pytest.approx(best) and len(got) == n
    many = np.random.default_rng(0).gamma(2, 3, 20000) + 0.3
    started = time.perf_counter()
    assert suggest_buckets(many)[-1] >= many.max() and time.perf_counter() - started < 5
    assert suggest_buckets([]) == () and suggest_buckets([1.0] * 5) == (1.0,)


def test_threads_end():
    before = threading.active_count()
    batches = Batches(some_rows(), TASK, batch_size=4)
    next(batches)
    del batches
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_errors_of_the_thread_arrive_in_order():
    def source():
        yield 1
        raise AudioError("broken")

    ahead = Prefetch(source(), 2)
    assert next(ahead) == 1
    with pytest.raises(AudioError, match="broken"):
        next(ahead)


def test_ctrl_c_keeps_the_position(monkeypatch):
    batches = Batches(some_rows(), TASK, batch_size=4, epochs=1)
    expected = collect(batches())
    next(batches)
    with monkeypatch.context() as patch:
        patch.setattr(Prefetch, "__next__", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            next(batches)
    equal(collect(batches), expected[1:])


def test_import_is_light():
    heavy = ["soundfile", "av", "torch", "datasets", "pyarrow", "scipy"]
    code = f"import jaxslim.data, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ---- joined clips ----


def test_clips_of_one_speaker_are_joined():
    records = [{"id": f"r{i}", "audio": wav(0.2 + 0.05 * i, i), "text": "abc " * (1 + i % 3) + "d",
                "speaker": "ab"[i % 2], "duration": 0.2 + 0.05 * i} for i in range(12)]
    rows = Rows(records, "test rows")
    long = joined(rows, 1.5, seed=0)
    assert len(long) > 15 and long.column("id") == joined(rows, 1.5, seed=0).column("id")
    assert [long.column(c)[:12] for c in ("id", "text")] == [rows.column(c) for c in ("id", "text")]
    for i in range(12, len(long)):
        part = [rows.column("id").index(name) for name in long.column("id")[i].split("+")]
        assert len(part) > 1 and {rows.column("speaker")[j] for j in part} == {long.column("speaker")[i]}
        assert long.column("text")[i] == " ".join(rows.column("text")[j] for j in part)
        wave = long.audio(i)
        assert len(wave) / 16000 == pytest.approx(long.duration(i), abs=2e-3) and long.duration(i) <= 1.5 + 1e-6
        np.testing.assert_array_equal(wave[: len(rows.audio(part[0]))], rows.audio(part[0]))
        np.testing.assert_array_equal(wave[-len(rows.audio(part[-1])):], rows.audio(part[-1]))
    batches = Batches(long, TASK, batch_size=4, epochs=1)
    assert sorted(i for b in batches for i in b["row"] if i >= 0) == list(range(len(long)))
