"""Damaged and hostile inputs by the thousand: each must end in success or in a clear error of ours.

    python scripts/fuzz.py [--kinds manifest yaml ...] [--count 10000] [--seed 0] [--only 123 --keep DIR] [--output F]

Input i of a kind is a good file, changed at random by a generator seeded with (seed, kind, i); so a failure is had
again by `--kinds KIND --only i --keep DIR`, which writes the file. Kinds: manifests (JSONL, CSV, TSV), YAML configs,
config.json, safetensors (a file; the index of a sharded folder), PyTorch `.bin` pickles (zip, legacy), audio (WAV,
FLAC, Ogg).

A failure is: an exception that is no class of this library, or whose message is no sentence; a signal that ends the
process; more than LIMIT seconds of CPU time (or twice that on the clock), or more than MEMORY bytes, for one input;
output that is left behind by an error, or is not there after a success. The work runs in child processes, so a crash is
counted and the run goes on. With --output the result is recorded; `docs/results/fuzz.json` is that of the default run.
Exit code 1 with failures.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import functools
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
LIMIT, MEMORY, LONGEST = 20.0, 2**30, 1500   # seconds; bytes; characters of a message
NUMBERS = ["0", "-1", "1e999", "-0.0", "NaN", "9" * 20, "2147483648", "1e-320", "0x1F", "1_000", "007", "", "9" * 5000]
STRINGS = ["", " ", "\x00", "../../../etc/passwd", "/dev/zero", "a" * 5000, "\ud800", "\u202e", "نص", "null", "~", "%s",
           "file:///etc/passwd", "gs://nowhere/x", "<script>", "'; DROP", "2020-13-45", "!!python/object:os.system x",
           "bundled:../..", "\n", "3*", "+", "a+b"]
VALUES = [None, True, [], {}, -1, 0, 1e308, 2**70, "x", "\x00", ["a", 1], {"a": {"b": []}}, [[[[[]]]]], 0.5, "1"]
SYNTAX = ["[", "{", '{"a":', "&a [*a]", "*a", "- ", "? ", "|", ">", "!!binary", "%", "\t", '"', "'"]
BYTES = [b"\x00", b"\xff", b"\x7f", b"\x80", b"\n", b'"', b"{", b"[", b":", b",", b"%"]
INTEGERS = [0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, 7, 300]


# ---- changes: (rng, data) -> data ----


def change_bytes(rng, data: bytes) -> bytes:
    """Up to four changes; most of them near the start, where headers are."""
    data = bytearray(data)
    for _ in range(min(int(rng.geometric(0.6)), 4)):
        if not data:
            break
        span = len(data) if rng.random() < 0.4 else min(len(data), 128)
        at, how = int(rng.integers(span)), int(rng.integers(8))
        if how == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif how == 1:
            data[at : at + 1] = BYTES[rng.integers(len(BYTES))]
        elif how == 2:
            del data[at:]
        elif how == 3:
            del data[at : at + int(rng.integers(1, 40))]
        elif how == 4:
            data[at:at] = data[at : at + int(rng.integers(1, 200))]
        elif how == 5:
            data[at:at] = rng.bytes(int(rng.integers(1, 20)))
        else:
            form = ("<I", ">I", "<Q", "<H")[rng.integers(4)]
            value = INTEGERS[rng.integers(len(INTEGERS))] % 2 ** (8 * struct.calcsize(form))
            data[at : at + struct.calcsize(form)] = struct.pack(form, value)
    return bytes(data)


def change_text(rng, text: str) -> str:
    """Lines, numbers and words replaced, lost or doubled."""
    for _ in range(min(int(rng.geometric(0.6)), 4)):
        lines, how = text.split("\n"), int(rng.integers(7))
        at = int(rng.integers(len(lines)))
        words = lines[at].split(" ")
        word = int(rng.integers(len(words)))
        if how == 0:
            del lines[at]
        elif how == 1:
            lines.insert(at, lines[int(rng.integers(len(lines)))])
        elif how == 2:
            words[word] = NUMBERS[rng.integers(len(NUMBERS))]
        elif how == 3:
            words[word] = STRINGS[rng.integers(len(STRINGS))]
        elif how == 4:
            words[word] = SYNTAX[rng.integers(len(SYNTAX))] * int(rng.choice([1, 2, 3000]))
        elif how == 5:
            lines[at] = str(rng.choice([" ", "\t", "- ", "#", ""])) + lines[at]
        else:
            lines[at] = lines[at][: int(rng.integers(len(lines[at]) + 1))]
        if how in (2, 3, 4):
            lines[at] = " ".join(words)
        text = "\n".join(lines)
    return text


def change_tree(rng, tree):
    """A leaf or branch of plain data replaced, lost, doubled or renamed."""
    places = list(_places(tree))
    if not places:
        return copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    node, key = places[rng.integers(len(places))]
    how, value = int(rng.integers(4)), copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    if how == 0:
        node[key] = value
    elif how == 1:
        del node[key]
    elif how == 2:
        node[key] = STRINGS[rng.integers(len(STRINGS))]
    elif isinstance(node, dict):
        node[STRINGS[rng.integers(len(STRINGS))]] = node.pop(key)
    else:
        node.append(value)
    return tree


def _places(tree):
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


def change_json(rng, text: str, lines: bool = False) -> str:
    """The data of a JSON text, or its text."""
    if rng.random() < 0.4:
        return change_text(rng, text)
    trees = [json.loads(line) for line in text.split("\n")] if lines else json.loads(text)
    for _ in range(min(int(rng.geometric(0.6)), 4)):
        trees = change_tree(rng, trees)
    return "\n".join(map(json.dumps, trees)) if lines and isinstance(trees, list) else json.dumps(trees)


def encoded(rng, text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return change_bytes(rng, data) if rng.random() < 0.2 else data


# ---- good inputs, made once ----


@functools.cache
def wave() -> np.ndarray:
    t = np.arange(1600, dtype=np.float32) / 16000
    noise = 0.01 * np.random.default_rng(0).standard_normal(1600)
    return (0.3 * np.sin(2 * np.pi * 440 * t) + noise).astype(np.float32)


@functools.cache
def sounds() -> dict[str, bytes]:
    import soundfile as sf

    kinds = {"pcm.wav": ("WAV", "PCM_16"), "float.wav": ("WAV", "FLOAT"), "x.wav": ("WAVEX", "PCM_24"),
             "a.flac": ("FLAC", "PCM_16"), "vorbis.ogg": ("OGG", "VORBIS"), "opus.ogg": ("OGG", "OPUS")}
    found = {}
    for name, (form, subtype) in kinds.items():
        buffer = io.BytesIO()
        sf.write(buffer, np.stack([wave(), -wave()], 1) if name == "x.wav" else wave(), 16000, format=form,
                 subtype=subtype)
        found[name] = buffer.getvalue()
    return found


@functools.cache
def manifests() -> dict[str, str]:
    rows = [{"id": f"r{i}", "audio_filepath": name, "duration": 0.1, "text": "ein text"} for i, name in
            enumerate(("pcm.wav", "a.flac"))]
    rows[1] |= {"offset": 0.05, "speaker": {"name": "b"}}
    table = ["path,sentence,duration", 'pcm.wav,"a, b",0.1', "a.flac,c d,0.1", "pcm.wav,e,"]
    return {"rows.jsonl": "\n".join(map(json.dumps, rows)), "rows.csv": "\n".join(table),
            "rows.tsv": "\n".join(line.replace(",", "\t") for line in table)}


@functools.cache
def configs() -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))}


@functools.cache
def model():
    """A small random model: config, and arrays by name."""
    from transformers import Wav2Vec2Config

    from jaxslim.models import bind
    from jaxslim.spec import Spec

    config = Wav2Vec2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                            conv_dim=[4, 4], conv_kernel=[10, 3], conv_stride=[5, 2], num_feat_extract_layers=2,
                            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=8).to_dict()
    config["architectures"] = ["Wav2Vec2ForCTC"]
    spec, rng = Spec(config, "wav2vec2", "ctc"), np.random.default_rng(0)
    return config, {k: rng.standard_normal(v.shape).astype(np.float32) for k, v in bind.shapes(spec).items()}


@functools.cache
def folders() -> dict[str, dict[str, bytes]]:
    """Kind of weights -> the files of a folder with them."""
    import safetensors.numpy

    config, arrays = model()
    common, names = {"config.json": json.dumps(config).encode()}, list(arrays)
    half = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    index = {"metadata": {"total_size": sum(a.nbytes for a in arrays.values())},
             "weight_map": {k: file for file, keys in half.items() for k in keys}}
    found = {"safetensors": common | {"model.safetensors": safetensors.numpy.save(arrays, {"format": "pt"})},
             "index": common | {"model.safetensors.index.json": json.dumps(index).encode()} | {
                 file: safetensors.numpy.save({k: arrays[k] for k in keys}) for file, keys in half.items()}}
    with contextlib.suppress(ImportError):
        import torch

        for name, zipped in (("bin", True), ("legacy", False)):
            buffer = io.BytesIO()
            torch.save({k: torch.from_numpy(v) for k, v in arrays.items()}, buffer,
                       _use_new_zipfile_serialization=zipped)
            found[name] = common | {"pytorch_model.bin": buffer.getvalue()}
    return found


# ---- kinds: (rng, folder) -> what to do, having written the input; what it does returns None or raises ----


def pick(rng, table: dict):
    name = list(table)[int(rng.integers(len(table)))]
    return name, table[name]


def manifest(rng, folder: pathlib.Path) -> Callable[[], None]:
    from jaxslim.data import load_rows, tools

    for name in ("pcm.wav", "a.flac"):
        (folder / name).write_bytes(sounds()[name])
    name, text = pick(rng, manifests())
    text = change_json(rng, text, lines=True) if name == "rows.jsonl" else change_text(rng, text)
    (folder / name).write_bytes(encoded(rng, text))

    def run():
        tools.prepare(str(folder / name), str(folder / "out"))
        rows = load_rows(folder / "out")
        rows.fingerprint, [rows.duration(i) for i in range(len(rows))]  # noqa: B018
    return run


def yaml(rng, folder: pathlib.Path) -> Callable[[], None]:
    import yaml as pyyaml

    from jaxslim import config, recipe

    name, text = pick(rng, configs())
    if rng.random() < 0.5:
        tree = pyyaml.safe_load(text)
        for _ in range(int(rng.integers(1, 4))):
            tree = change_tree(rng, tree)
        with contextlib.suppress(pyyaml.YAMLError):
            text = pyyaml.safe_dump(tree)
    else:
        text = change_text(rng, text)
    path = folder / name
    path.write_bytes(encoded(rng, text))

    def run():
        if name.startswith("train") or "_ctc" in name:
            found = config.load(config.Run, str(path))
            config.build(recipe.METHODS["train"], found.options, f"{path}: options")
        else:
            found = config.load(config.Recipe, str(path))
            for stage in found.stages:
                recipe.method_of(stage)
        config.load(type(found), _rewritten(path, config.dump(found)))
    return run


def _rewritten(path: pathlib.Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def weights(what: tuple[str, ...], file: Callable[[str], bool], rng, folder: pathlib.Path) -> Callable[[], None]:
    from jaxslim import hub

    files = dict(folders()[what[rng.integers(len(what))]])
    name = next(n for n in sorted(files) if file(n))
    data = files[name]
    if name.endswith(".json"):
        files[name] = encoded(rng, change_json(rng, data.decode()))
    elif name.endswith(".safetensors") and rng.random() < 0.5:
        size = int.from_bytes(data[:8], "little")
        header = encoded(rng, change_json(rng, data[8 : 8 + size].decode()))
        files[name] = struct.pack("<Q", len(header)) + header + data[8 + size :]
    else:
        files[name] = change_bytes(rng, data)
    (folder / "in").mkdir()
    for n, d in files.items():
        (folder / "in" / n).write_bytes(d)

    def run():
        hub.import_model(folder / "in", folder / "out")
        hub.load(folder / "out")
    return run


def audio(rng, folder: pathlib.Path) -> Callable[[], None]:
    from jaxslim.data import audio as reader

    name, data = pick(rng, sounds())
    path = folder / name
    path.write_bytes(change_bytes(rng, data))

    def run():
        samples = reader.load(path)
        assert samples.ndim == 1 and samples.dtype == np.float32 and np.isfinite(samples).all()
        assert reader.seconds(path) >= 0
    return run


KINDS: dict[str, Callable] = {
    "manifest": manifest, "yaml": yaml, "audio": audio,
    "safetensors": functools.partial(weights, ("safetensors",), lambda n: n == "model.safetensors"),
    "config": functools.partial(weights, ("safetensors",), lambda n: n == "config.json"),
    "index": functools.partial(weights, ("index",), lambda n: n.endswith("index.json")),
    "bin": functools.partial(weights, ("bin", "legacy"), lambda n: n == "pytorch_model.bin"),
}


# ---- running ----


def attempt(kind: str, i: int, seed: int = 0, keep: str | None = None) -> dict:
    """Runs one input: {"outcome": "success", "error" or "failure", ...}."""
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode()), i])
    with tempfile.TemporaryDirectory(prefix="fuzz-") as tmp:
        folder = pathlib.Path(tmp)
        run = KINDS[kind](rng, folder)
        if keep:
            shutil.copytree(folder, pathlib.Path(keep) / f"{kind}-{i}", dirs_exist_ok=True)
        found = {"outcome": "success"}
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            run()
        except Exception as error:  # which ones are good is what is asked here
            own = type(error).__module__.startswith("jaxslim")
            text = str(error)
            found = {"outcome": "error" if own else "failure", "error": type(error).__name__, "message": text[:200]}
            if not own:
                found["trace"] = traceback.format_exc().strip().splitlines()[-7:]
            elif not 10 <= len(text) <= LONGEST or "\n" in text.replace(str(folder), "") and "  " in text:
                found |= {"outcome": "failure", "error": f"message of {len(text)} characters"}
        left = [p.name for p in folder.iterdir() if p.name.lstrip(".").startswith("out") and (
            not p.is_dir() or any(p.iterdir()))]
        if found["outcome"] == "error" and left:
            found |= {"outcome": "failure", "error": f"left behind {left[0]}"}
    seconds = time.process_time() - start   # of this process: others may be busy
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if seconds > LIMIT or grown > MEMORY:
        found |= {"outcome": "failure", "error": f"took {seconds:.1f} s and {grown / 2**20:.0f} MiB"}
    return {"kind": kind, "input": i, "seconds": round(seconds, 4), **found}


def child(jobs: list[tuple[str, int]], seed: int, keep: str | None, pipe: int) -> None:
    with open(os.devnull, "w") as null, os.fdopen(pipe, "w") as out:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
        for kind, i in jobs:
            out.write(json.dumps(attempt(kind, i, seed, keep)) + "\n")
            out.flush()


def parallel(jobs: list[tuple[str, int]], seed: int = 0, keep: str | None = None, report=lambda n: None):
    """Results of all jobs, in order. A child that dies or hangs costs one input; the next starts behind it."""
    results: list[dict] = []
    while len(results) < len(jobs):
        reads, writes = os.pipe()
        rest = jobs[len(results) :]
        pid = os.fork()
        if not pid:
            os.close(reads)
            code = 1
            try:
                child(rest, seed, keep, writes)
                code = 0
            finally:
                os._exit(code)
        os.close(writes)
        waits = 2 * LIMIT + 60  # the first input of a child imports and compiles
        with os.fdopen(reads, "rb", buffering=0) as pipe:
            pending = b""
            while select.select([pipe], [], [], waits)[0]:
                data = pipe.read(65536)
                if not data:
                    break
                *lines, pending = (pending + data).split(b"\n")
                results += map(json.loads, lines)
                report(len(results))
                waits = 2 * LIMIT
            else:
                os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if status and len(results) < len(jobs):
            kind, i = jobs[len(results)]
            what = ("more than the time limit" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else
                    f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "the process ended")
            results.append({"kind": kind, "input": i, "seconds": 0.0, "outcome": "failure", "error": what})
    return results


def summary(results: list[dict]) -> list[dict]:
    """A row for each kind."""
    rows = []
    for kind in dict.fromkeys(r["kind"] for r in results):
        mine = [r for r in results if r["kind"] == kind]
        count = collections.Counter(r["outcome"] for r in mine)
        rows.append({"kind": kind, "inputs": len(mine), **{k: count[k] for k in ("success", "error", "failure")},
                     "errors": dict(collections.Counter(r["error"] for r in mine if r["outcome"] == "error")),
                     "slowest_seconds": max(r["seconds"] for r in mine),
                     "failures": [r for r in mine if r["outcome"] == "failure"][:20]})
    return rows


def warm() -> None:
    """Makes the good inputs, and imports what reads them, so that no input pays for it."""
    for build in (sounds, manifests, configs, model, folders):
        build()
    import jaxslim.data.tools
    import jaxslim.hub
    import jaxslim.recipe  # noqa: F401


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--count", type=int, default=10_000, help="inputs in all (default 10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this input alone, in this process")
    parser.add_argument("--keep", metavar="DIR", help="write the inputs there")
    parser.add_argument("--output", type=pathlib.Path, help="record the result")
    args = parser.parse_args()
    if args.only is not None:
        print(json.dumps([attempt(kind, args.only, args.seed, args.keep) for kind in args.kinds], indent=1))
        return 0
    each = -(-args.count // len(args.kinds))
    jobs = [(kind, i) for kind in args.kinds for i in range(each)][: args.count]
    start = time.perf_counter()
    warm()
    results = parallel(jobs, args.seed, args.keep, lambda n: n % 500 == 0 and print(n, file=sys.stderr, flush=True))
    rows = summary(results)
    for row in rows:
        print(f"{row['kind']:12} {row['inputs']} inputs: {row['success']} succeed, {row['error']} end in an error of "
              f"ours, {row['failure']} fail; the slowest took {row['slowest_seconds']:.2f} s")
        for failure in row["failures"]:
            print(f"  {json.dumps(failure)[:600]}")
    if args.output:
        versions = {name: importlib.metadata.version(name) for name in ("jaxslim", "numpy", "safetensors", "soundfile",
                                                                        "av", "pyarrow", "PyYAML")}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps([{**row, "seed": args.seed, "device": f"cpu ({platform.machine()})",
                                            "versions": {"python": platform.python_version(), **versions},
                                            "command": f"python scripts/fuzz.py --count {args.count}"} for row in rows],
                                          indent=1) + "\n")
        print(f"{args.output}: {time.perf_counter() - start:.0f} s")
    return int(any(row["failure"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
