"""Streamed training data: every row once an epoch, fixed shapes, exact resume, hosts in step.

Most are slow: `datasets` waits five seconds whenever it closes a Parquet stream.
"""
import io
import json
import sys
import tarfile

import hosts
import numpy as np
import pytest
from test_data import TASK, collect, equal, wav

from jaxslim import recipe
from jaxslim.data import streaming
from jaxslim.data.rows import DataError, Rows
from jaxslim.data.streaming import StreamBatches

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
N = 46


def rows(n=N, first=0):
    return [{"id": f"r{i}", "audio": {"bytes": wav(0.2 + 0.02 * (i * 7 % 40), i), "path": f"{i}.wav"},
             "text": "abc " * (1 + i % 5)} for i in range(first, first + n)]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    for part in range(2):
        pq.write_table(pa.Table.from_pylist(rows(N // 2, part * (N // 2))), folder / f"part-{part}.parquet",
                       row_group_size=5)
    return f"stream:{folder}/part-{{0..1}}.parquet"


def ids(taken):
    return [name for batch, names in taken for name in names]


def epoch(batches):
    """[(batch, ids of its rows)]: ids at once, as `rows` is the present block."""
    return [(b, [batches.rows.column("id")[i] for i in b["row"] if i >= 0]) for b in batches]


@pytest.mark.slow
def test_every_row_once_with_its_own_audio_and_text(parquet):
    batches = StreamBatches(parquet, TASK, batch_size=4, block=16, epochs=2)
    taken = epoch(batches)
    assert sorted(ids(taken)) == sorted(2 * [f"r{i}" for i in range(N)]) and not batches.skipped
    half = [names for _, names in taken]
    assert half[:len(half) // 2] != half[len(half) // 2:]  # another order in the second epoch
    table = Rows(rows())
    at = {name: i for i, name in enumerate(table.column("id"))}
    for batch, names in taken[:6]:
        assert batch["input_values"].shape in [(b, s) for b, s, _ in batches.shapes]
        for k, name in enumerate(names):
            wave = table.audio(at[name])
            mine = batch["input_values"][k, : batch["samples"][k]]
            assert len(mine) == len(wave) and np.corrcoef(mine, wave)[0, 1] > 0.9999  # the extractor normalises
            assert batch["labels"][k][batch["labels"][k] >= 0].tolist() == list(TASK.encode(table[at[name]]["text"]))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [0, 5, 14])
def test_resumes_exactly(parquet, stop):
    make = lambda: StreamBatches(parquet, TASK, batch_size=4, block=16, epochs=2)  # noqa: E731
    whole, first, again = collect(make()), make(), make()
    begun = [next(first) for _ in range(stop)]
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    again.set_state(state)
    equal(whole, begun + collect(again))


@pytest.mark.slow
def test_reads_one_block_again_and_no_more(parquet, monkeypatch):
    first, again = (StreamBatches(parquet, TASK, batch_size=2, block=8, prefetch=0) for _ in range(2))
    for _ in range(20):
        next(first)
    state, read = first.get_state(), []
    assert state["block"] >= 3
    monkeypatch.setattr(streaming.Reader, "read", lambda self, old=streaming.Reader.read: read.append(0) or old(self))
    again.set_state(state)
    next(again)
    again.close()
    assert len(read) <= 2  # the present block, and the one ahead


@pytest.mark.slow
@pytest.mark.parametrize("count", [2])
def test_hosts_run_the_same_shapes_and_share_the_rows(parquet, monkeypatch, count):
    """The hosts in turn: first each one's own counts are noted, then all agree on the largest."""
    counted: dict[int, list] = {}

    def note(host):
        own: list = []
        monkeypatch.setattr(streaming, "_most", lambda counts, some, n: own.append([*counts, some]) or (counts, some))
        for _ in StreamBatches(parquet, TASK, batch_size=6, block=6, epochs=1, host=host, hosts=count):
            pass
        counted[host] = own

    for host in range(count):
        note(host)
    blocks = max(len(own) for own in counted.values())
    for own in counted.values():
        own += [[0] * len(own[0])] * (blocks - len(own))
    most = [np.max([own[k] for own in counted.values()], 0).tolist() for k in range(blocks)]
    taken = []
    for host in range(count):
        agreed = iter([(m[:-1], bool(m[-1])) for m in most])
        monkeypatch.setattr(streaming, "_most", lambda *_, agreed=agreed: next(agreed))
        taken.append(epoch(StreamBatches(parquet, TASK, batch_size=6, block=6, epochs=1, host=host, hosts=count)))
    shapes = [[b["input_values"].shape for b, _ in each] for each in taken]
    assert all(s == shapes[0] for s in shapes) and shapes[0][0][0] == 6 // count
    assert sorted(name for each in taken for _, names in each for name in names) == sorted(f"r{i}" for i in range(N))


@pytest.mark.slow
def test_another_number_of_hosts_goes_on_about_there(parquet, caplog):
    one, two = (StreamBatches(parquet, TASK, batch_size=4, block=8, hosts=h) for h in (1, 2))
    for _ in range(6):
        next(one)
    state = one.get_state()
    two.set_state(state)
    assert two.get_state.__self__._skip == state["block"] * 8 // 2 and "2 hosts instead of 1" in caplog.text


def tar_files(folder, rows_each=(14, 9)):
    first = 0
    for part, count in enumerate(rows_each):
        with tarfile.open(folder / f"s-{part}.tar", "w") as tar:
            for row in rows(count, first):
                for ending, data in (("wav", row["audio"]["bytes"]), ("txt", row["text"].encode()),
                                     ("json", json.dumps({"speaker": "x"}).encode())):
                    info = tarfile.TarInfo(f"{row['id']}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        first += count
    return f"stream:{folder}/s-{{0..{len(rows_each) - 1}}}.tar"


def test_tar_files(tmp_path):
    batches = StreamBatches(tar_files(tmp_path, (8, 8)), TASK, batch_size=4, block=16, epochs=1)
    taken = epoch(batches)
    assert sorted(ids(taken)) == sorted(f"r{i}" for i in range(16))
    assert set(batches.rows.column("speaker")) == {"x"}


def test_what_fits_no_bucket_is_counted(tmp_path):
    table = rows(12)
    table[9]["text"] = "abc " * 60  # in the second block
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet")
    batches = StreamBatches(f"stream:{tmp_path}/a.parquet", TASK, batch_size=4, block=6, epochs=1, shuffle=False,
                            max_skipped=0.5)
    seen = ids(epoch(batches))
    assert "r9" not in seen and len(seen) == 11
    assert [name for name, _ in batches.skipped] == ["r9"] and "fit no bucket" in batches.skipped[0][1]


@pytest.mark.slow
def test_errors(tmp_path, parquet):
    with pytest.raises(DataError, match="cannot be opened as a stream"):
        StreamBatches(f"stream:{tmp_path}/none.parquet", TASK)
    with pytest.raises(DataError, match="one data set"):
        StreamBatches(f"stream:3*{tmp_path}/a.parquet", TASK)
    table = [row | {"text": ""} for row in rows(3)]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "silent.parquet")
    with pytest.raises(DataError, match="unusable|no row of the first"):
        StreamBatches(f"stream:{tmp_path}/silent.parquet", TASK, max_skipped=1.0)
    other = StreamBatches(parquet, TASK, seed=1, batch_size=4).get_state()
    with pytest.raises(DataError, match="cannot be resumed"):
        StreamBatches(parquet, TASK, seed=2, batch_size=4).set_state(other)


@pytest.mark.slow
def test_a_run_trains_from_a_stream_and_resumes(small, tmp_path):
    manifest = [json.loads(line) for line in open(small["train"])]
    folder = small["train"].rsplit("/", 1)[0]
    table = [{"id": r["id"], "text": r["text"], "audio": {"bytes": open(f"{folder}/{r['audio']}", "rb").read(),
                                                          "path": r["audio"]}} for r in manifest]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "train.parquet", row_group_size=2)
    (tmp_path / "run.yaml").write_text(json.dumps({
        "model": small["model"], "data": {"train": f"stream:{tmp_path}/train.parquet"}, "max_steps": 4, "save_steps": 1,
        "per_device_train_batch_size": 4, "min_seconds": 0.0, "output_dir": str(tmp_path / "whole")}))
    part = [f"output_dir={tmp_path}/part", "groups.main.schedule=constant"]
    a = recipe.train(str(tmp_path / "run.yaml"), [f"output_dir={tmp_path}/a", "groups.main.schedule=constant"])
    with pytest.MonkeyPatch.context() as patch:
        steps = iter(range(10))
        real = recipe.loop.S.make

        def stops(*args):
            step = real(*args)

            def one(*inputs):
                if next(steps) == 2:
                    raise KeyboardInterrupt
                return step(*inputs)

            return one

        patch.setattr(recipe.loop.S, "make", stops)
        with pytest.raises(KeyboardInterrupt):
            recipe.train(str(tmp_path / "run.yaml"), part)
    b = recipe.train(str(tmp_path / "run.yaml"), part)
    for k, v in a.params.items():
        np.testing.assert_array_equal(v, b.params[k], err_msg=k)


@pytest.mark.multiprocess
def test_two_processes_stay_in_step_and_resume(tmp_path):
    """Each reads its own file, the longer one sets the count; a state taken in the middle gives the rest again."""
    source = tar_files(tmp_path)
    outs = hosts.two(__file__, source)
    shapes = [[shape for shape, _ in o["whole"]] for o in outs]
    assert shapes[0] == shapes[1] and shapes[0][0][0] == 2
    seen = [sorted(name for _, names in o["whole"] for name in names) for o in outs]
    assert sorted(seen[0] + seen[1]) == sorted(f"r{i}" for i in range(23)) and not {*seen[0]} & {*seen[1]}
    for o in outs:
        assert o["rest"] == o["whole"][4:] and o["state"]["hosts"] == 2
    assert outs[0]["state"] == outs[1]["state"]


def child(address, process, source):
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, int(process))
    jax.devices()  # both at once: to wait for the other ends after two minutes
    make = lambda: StreamBatches(source, TASK, batch_size=4, block=5, epochs=1, buckets=(0.6, 1.1),  # noqa: E731
                                 host=int(process), hosts=2)
    short = lambda taken: [(b["input_values"].shape, names) for b, names in taken]  # noqa: E731
    whole, first, again = short(epoch(make())), make(), make()
    for _ in range(4):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    again.set_state(state)
    print(json.dumps({"whole": whole, "rest": short(epoch(again)), "state": state}))


if __name__ == "__main__":
    child(*sys.argv[1:])
