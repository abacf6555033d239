"""Weights in PyTorch's own formats are read exactly and nothing else is: every hostile pickle is refused unrun."""
import collections
import io
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxslim.pickle_reader import MAGIC, PickleError, read

torch = pytest.importorskip("torch")


def state(dtype=torch.float32):
    make = torch.Generator().manual_seed(0)
    shared = torch.randn(4, 6, generator=make)
    tensors = collections.OrderedDict(
        a=torch.randn(3, 5, generator=make), scalar=torch.tensor(2.5), empty=torch.zeros(0, 3), t=shared.t(),
        piece=shared[1:3, 2:], parameter=torch.nn.Parameter(torch.randn(7, generator=make)), tied=shared)
    tensors = collections.OrderedDict((k, v if k == "parameter" and dtype == torch.float32 else v.detach().to(dtype))
                                      for k, v in tensors.items())
    tensors["count"], tensors["flag"] = torch.tensor(3), torch.tensor([True, False])
    for name in ("int32", "int16", "int8", "uint8", "float64", "float16", "bfloat16"):
        tensors[name] = torch.arange(5).to(getattr(torch, name))
    tensors._metadata = {"": {"version": 1}}
    return tensors


def plain(x):
    x = x.detach()
    return x.float().numpy().astype(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_reads_what_torch_writes(zipped, dtype, tmp_path):
    tensors = state(getattr(torch, dtype))
    torch.save(tensors, tmp_path / "w.bin", _use_new_zipfile_serialization=zipped)
    have = read(tmp_path / "w.bin")
    assert list(have) == list(tensors)
    for name, want in tensors.items():
        want = plain(want)
        assert have[name].dtype == want.dtype and have[name].shape == want.shape
        np.testing.assert_array_equal(have[name], want)
        assert not want.size or not have[name].flags.writeable


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_nothing_is_copied(zipped, tmp_path):
    torch.save({"a": torch.ones(1000, 1000), "b": torch.ones(10)}, tmp_path / "w.bin",
               _use_new_zipfile_serialization=zipped)
    assert all(x.base is not None and not x.flags.owndata for x in read(tmp_path / "w.bin").values())


# Hostile files. A payload is the bytes of one pickle; it is put where torch.load would run it.


def zipped(payload: bytes, storages=(("0", b"\0" * 64),), method=zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("archive/data.pkl", payload)
        for key, data in storages:
            archive.writestr(f"archive/data/{key}", data)
    return out.getvalue()


def legacy(payload: bytes) -> bytes:
    header = [MAGIC, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(x, 2) for x in header) + payload + pickle.dumps([], 2)


def bare(payload: bytes) -> bytes:
    return payload


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


class Reduce:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class Named:
    """Pickles as module.name(*args) without importing it."""

    def __init__(self, module, name, *args):
        self.call = (module, name, args)

    def pickled(self, stacked: bool) -> bytes:
        module, name, args = self.call
        found = (text(module) + text(name) + b"\x93") if stacked else f"c{module}\n{name}\n".encode()
        return b"\x80\x04" + found + pickle.dumps(args, 2)[2:-1] + b"R."


CANARY = "touch {}"
GLOBALS = [
    ("os", "system", CANARY), ("posix", "system", CANARY), ("nt", "system", CANARY), ("os", "popen", CANARY),
    ("os", "execv", "/bin/sh", ("sh",)), ("subprocess", "Popen", CANARY), ("subprocess", "check_output", CANARY),
    ("subprocess", "getoutput", CANARY), ("commands", "getoutput", CANARY), ("pty", "spawn", CANARY),
    ("builtins", "eval", "open('{}', 'w')"), ("builtins", "exec", "open('{}', 'w')"), ("builtins", "compile", "1"),
    ("builtins", "open", "{}", "w"), ("builtins", "__import__", "os"), ("__builtin__", "eval", "open('{}', 'w')"),
    ("builtins", "getattr", "x", "y"), ("builtins", "setattr", "x", "y", 1), ("builtins", "globals"),
    ("builtins", "map", "x"), ("builtins", "breakpoint"), ("builtins", "input"), ("builtins", "bytearray", 2**40),
    ("webbrowser", "open", "file:///"), ("runpy", "_run_code", "open('{}', 'w')", {}), ("runpy", "run_path", "{}"),
    ("runpy", "run_module", "antigravity"), ("importlib", "import_module", "antigravity"), ("antigravity", "geohash"),
    ("code", "interact"), ("pdb", "run", "open('{}', 'w')"), ("timeit", "timeit", "open('{}', 'w')"),
    ("cProfile", "run", "open('{}', 'w')"), ("profile", "run", "1"), ("trace", "Trace"), ("bdb", "Bdb"),
    ("doctest", "debug_script", "open('{}', 'w')"), ("pip", "main", ["list"]), ("pip._internal", "main", ["list"]),
    ("ctypes", "CDLL", "libc.so.6"), ("ctypes.util", "find_library", "c"), ("_ctypes", "dlopen", "x"),
    ("socket", "create_connection", ("127.0.0.1", 9)), ("urllib.request", "urlopen", "file:///"),
    ("requests.api", "get", "http://127.0.0.1:9"), ("httplib", "HTTPSConnection", "x"), ("smtplib", "SMTP", "x"),
    ("shutil", "rmtree", "{}"), ("shutil", "move", "{}", "x"), ("pathlib", "Path", "{}"), ("tempfile", "mktemp"),
    ("operator", "attrgetter", "system"), ("operator", "methodcaller", "system", CANARY),
    ("_operator", "itemgetter", 0),
    ("functools", "partial", "x"), ("functools", "reduce", "x"), ("itertools", "chain", "x"), ("types", "CodeType"),
    ("types", "FunctionType"), ("marshal", "loads", b"x"), ("pickle", "loads", b"x"), ("_pickle", "loads", b"x"),
    ("dill", "loads", b"x"), ("joblib", "load", "{}"), ("sys", "setprofile"), ("sys", "modules"), ("asyncio", "run"),
    ("multiprocessing.util", "spawnv_passfds", "x"), ("logging.config", "_resolve", "os.system"),
    ("numpy.testing._private.utils", "runstring", "open('{}', 'w')", {}), ("numpy", "load", "{}"),
    ("numpy.f2py.crackfortran", "myeval", "open('{}', 'w')"), ("numpy.core.multiarray", "_reconstruct"),
    ("torch", "load", "{}"), ("torch.serialization", "load", "{}"), ("torch.hub", "load", "x", "y"),
    ("torch.hub", "download_url_to_file", "x", "{}"), ("torch.storage", "_load_from_bytes", b"x"),
    ("torch.storage", "_load_from_bytes.__globals__", b"x"), ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    ("torch._inductor.codecache", "compile_file", "x"), ("torch.utils.bottleneck.__main__", "run_cprofile"),
    ("torch.utils.collect_env", "run", CANARY), ("torch.jit.unsupported_tensor_ops", "execWrapper", "1", {}, {}),
    ("torch.fx.experimental.symbolic_shapes", "ShapeEnv.evaluate_guards_expression", "x"),
    ("torch._dynamo.guards", "GuardBuilder.get", "x"), ("torch._utils", "_import_dotted_name", "os.system"),
    ("torch._utils", "_rebuild_wrapper_subclass"), ("torch._tensor", "_rebuild_from_type_v2"), ("torch", "_C"),
    ("torch.nn.modules.linear", "Linear", 1, 1), ("collections", "OrderedDict.__init__.__globals__"),
    ("collections.abc", "OrderedDict"), ("collections", "defaultdict"), ("collections", "UserDict"),
    ("jaxslim.pickle_reader", "Tensor"), ("jaxslim.hub", "push"), ("transformers", "AutoModel.from_pretrained", "{}"),
    ("lib2to3.pgen2.pgen", "ParserGenerator"), ("idlelib.pyshell", "ModifiedInterpreter.runcode"),
    ("ensurepip._bootstrap", "x"), ("site", "addsitedir", "{}"), ("gc", "get_objects"), ("inspect", "currentframe"),
    ("uuid", "_get_command_stdout", "touch", "{}"), ("test.support.script_helper", "assert_python_ok", "-c", "1"),
    ("venv", "create", "{}"), ("zipimport", "zipimporter", "{}"), ("zipfile", "PyZipFile", "{}"),
    ("aiohttp.client", "x"),
    ("ssl", "get_server_certificate", ("127.0.0.1", 9)), ("bz2", "BZ2File", "{}", "w"), ("_io", "FileIO", "{}", "w"),
    ("io", "open_code", "{}"), ("signal", "raise_signal", 9), ("_posixsubprocess", "fork_exec"), ("hashlib", "new"),
]


def refused(data: bytes, tmp_path, match="refused|no PyTorch weights file"):
    canary, file = tmp_path / "canary", tmp_path / "w.bin"
    file.write_bytes(data)
    with pytest.raises(PickleError, match=match) as caught:
        read(file)
    assert not canary.exists() and str(caught.value).startswith(str(file)) and str(caught.value).endswith(".")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


def filled(value, canary):
    if isinstance(value, str):
        return value.replace("{}", str(canary))
    return type(value)(filled(v, canary) for v in value) if isinstance(value, (tuple, list)) else value


@pytest.mark.parametrize("module, name, args", [(m, n, a) for m, n, *a in GLOBALS], ids=lambda x: str(x)[:40])
def test_named_calls_are_refused(module, name, args, tmp_path):
    call = Named(module, name, *filled(args, tmp_path / "canary"))
    for stacked in (False, True):
        for container in (zipped, legacy, bare):
            assert name[:20] in refused(container(call.pickled(stacked)), tmp_path)


def exploits(canary) -> dict[str, bytes]:
    run = f"touch {canary}"
    system = pickle.dumps(Reduce(os.system, run), 2)[2:-1]
    good = b"ccollections\nOrderedDict\n)R"
    item = text("weight")
    return {
        "reduce, protocol 0": pickle.dumps(Reduce(os.system, run), 0),
        "reduce, protocol 5": pickle.dumps(Reduce(os.system, run), 5),
        "eval by reduce": pickle.dumps(Reduce(eval, f"open('{canary}', 'w')"), 4),
        "exec by reduce": pickle.dumps({"weight": Reduce(exec, f"open('{canary}', 'w')")}, 4),
        "value of a state dict": b"\x80\x02" + good + item + system + b"s.",
        "key of a state dict": b"\x80\x02" + good + system + item + b"s.",
        "injected before the real object": b"\x80\x02" + system + b"0" + good + b".",
        "injected after the real object": b"\x80\x02" + good + system + b"0.",
        "INST": f"(S'{run}'\nios\nsystem\n.".encode(),
        "OBJ": b"(cos\nsystem\n" + text(run) + b"o.",
        "NEWOBJ": b"\x80\x02cos\nsystem\n" + text(run) + b"\x85\x81.",
        "NEWOBJ of a known name": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        "NEWOBJ_EX": b"\x80\x04" + text("os") + text("system") + b"\x93" + text(run) + b"\x85}\x92.",
        "extension registry": b"\x80\x02\x82\x01.", "EXT4": b"\x80\x02\x84\x01\0\0\0.",
        "BUILD on a rebuilder": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}" + text("__defaults__") + b")sb.",
        "BUILD with slots on a class": b"\x80\x02ccollections\nOrderedDict\nN}" + text("x") + b"Ns\x86b.",
        "BUILD with __setstate__": b"\x80\x02" + good + b"}" + text("__setstate__") + b"cos\nsystem\nsb"
                                   + text(run) + b"b.",
        "dotted STACK_GLOBAL": b"\x80\x04" + text("collections") + text("OrderedDict.fromkeys") + b"\x93).",
        "getattr chain": b"\x80\x04cbuiltins\ngetattr\ncbuiltins\n__import__\n" + text("os") + b"\x85R" + text("system")
                         + b"\x86R" + text(run) + b"\x85R.",
        "STACK_GLOBAL of memo items": b"\x80\x04" + text("os") + b"\x940" + text("system") + b"\x940h\0h\1\x93"
                                      + text(run) + b"\x85R.",
        "memo overwritten": b"\x80\x02ccollections\nOrderedDict\nq\0cos\nsystem\nq\0" + text(run) + b"\x85R.",
        "call of a string": b"\x80\x02" + text("os.system") + text(run) + b"\x85R.",
        "call of a storage type": b"\x80\x02ctorch\nFloatStorage\n" + b"K\x10\x85R.",
        "persistent id that calls": b"\x80\x02" + system + b"Q.",
        "textual persistent id": b"Pstorage\n.",
        "storage type that calls": b"\x80\x02(" + text("storage") + b"cos\nsystem\n" + text("0") + text("cpu")
                                   + b"K\x10tQ.",
        "class that is not known": b"\x80\x02cargparse\nNamespace\n)R.",
        "second pickle inside bytes": pickle.dumps(Reduce(pickle.loads, pickle.dumps(Reduce(os.system, run)))),
    }


@pytest.mark.parametrize("what", exploits(""))
def test_exploits_are_refused(what, tmp_path):
    payload = exploits(tmp_path / "canary")[what]
    for container in (zipped, legacy, bare):
        refused(container(payload), tmp_path, "refused|no state dict has them|not a PyTorch weights file")


def test_the_exploits_are_real(tmp_path):
    """Python's own unpickler runs them: what is tested above is not a row of broken files."""
    for what in ("reduce, protocol 0", "exec by reduce", "injected before the real object", "INST", "OBJ",
                 "getattr chain", "STACK_GLOBAL of memo items", "memo overwritten", "second pickle inside bytes",
                 "value of a state dict", "injected after the real object"):
        canary = tmp_path / "canary"
        try:
            pickle.loads(exploits(canary)[what])
        except pickle.UnpicklingError:
            pass
        assert canary.exists(), what
        canary.unlink()


def test_what_follows_the_pickle_is_not_looked_at(tmp_path):
    good = b"\x80\x02ccollections\nOrderedDict\n)R."
    payload = good + pickle.dumps(Reduce(os.system, f"touch {tmp_path / 'canary'}"))
    (tmp_path / "w.bin").write_bytes(zipped(payload))
    assert read(tmp_path / "w.bin") == {} and not (tmp_path / "canary").exists()


def tensor(count=16, offset=0, size=(4, 4), stride=(4, 1), key="0", kind="FloatStorage") -> bytes:
    value = lambda v: pickle.dumps(v, 2)[2:-1]  # noqa: E731
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + value(key) + text("cpu") + value(count) + b"tQ"
    built = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + value(offset) + value(size) + value(stride)
    return b"\x80\x02}" + text("weight") + built + b"\x89}tRs."


IMPOSSIBLE = {
    "size beyond the storage": dict(size=(4, 5)), "stride beyond": dict(stride=(5, 1)), "offset beyond": dict(offset=1),
    "huge size": dict(size=(2**40, 2**40)), "huge with stride 0": dict(size=(2**40,), stride=(0,)),
    "overflowing stride": dict(stride=(2**62, 2**62)), "big integers": dict(size=(10**400, 1)),
    "negative offset": dict(offset=-4), "negative size": dict(size=(-4, -4)), "negative stride": dict(stride=(-4, 1)),
    "stride missing": dict(stride=(1,)), "sizes that are no numbers": dict(size=("4", "4")),
    "sizes that are booleans": dict(size=(True, True)), "floating offset": dict(offset=0.5),
    "fifty dimensions": dict(size=(1,) * 50, stride=(1,) * 50), "storage announced larger": dict(count=2**40),
    "storage announced smaller": dict(count=8, size=(2, 4)), "no such storage": dict(key="1"),
    "path as key": dict(key="../../data.pkl"), "key that is no text": dict(key=0), "negative count": dict(count=-1),
    "storage of another kind": dict(kind="Tensor"),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_impossible_tensors_are_refused(what, tmp_path):
    assert tensor() and read_bytes(zipped(tensor()), tmp_path)["weight"].shape == (4, 4)
    refused(zipped(tensor(**IMPOSSIBLE[what])), tmp_path, "impossibl|beyond|announced|refused|no part|not known")


def read_bytes(data, tmp_path):
    (tmp_path / "good.bin").write_bytes(data)
    return read(tmp_path / "good.bin")


def test_bombs(tmp_path):
    doubling = b"\x80\x02)" + b"2\x86" * 10000 + b"."  # DUP is refused; with the memo it works:
    tower = b")" + b"q\0h\0\x86" * 10000               # a pair of a pair of ..., 2**10000 leaves when printed or hashed
    nested = b"\x80\x02]" + b"]" * 200000 + b"a" * 200000 + b"."
    cases = {b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x": "truncated", doubling: "refused|no state dict",
             nested: "no state dict|holds a list", b"\x80\x02\x8b" + struct.pack("<I", 2**31 - 1) + b"\1": "truncated",
             b"I" + b"9" * 100000 + b"\n.": "truncated", b"\x80\x02h\7.": "truncated", b"\x80\x02t.": "start mark",
             b"\x80\x02}.": None, b"\x80\x02}": "truncated|ends", b"\xff\xfe": "truncated", b"\x80\x02}s.": "truncated",
             b"\x80\x02}K\1K\2s.": "no tensor", b"\x80\x02" + b"]r\xff\xff\xff\xff.": "holds a list"}
    refused(legacy(b"\x80\x02}.")[:-4] + b"]" + tower + b"a.", tmp_path, "neither text|truncated")
    for payload, match in cases.items():
        if match:
            refused(zipped(payload), tmp_path, match)


def test_damaged_files(tmp_path):
    file = tmp_path / "w.bin"
    for new in (True, False):
        torch.save(state(), file, _use_new_zipfile_serialization=new)
        data = file.read_bytes()
        for size in (1, 3, 30, 200, len(data) // 2, len(data) - 3):
            refused(data[:size], tmp_path, "truncated|finish the download|not one that torch.save|no PyTorch")
    refused(b"", tmp_path, "empty")
    refused(b"version https://git-lfs.github.com/spec/v1\n", tmp_path, "truncated or not")
    refused(b"\0" * 1000, tmp_path, "truncated or not")
    refused(zipped(tensor(), method=zipfile.ZIP_DEFLATED), tmp_path, "compressed")
    refused(zipped(tensor()).replace(b"archive/data.pkl", b"archive/data.pkx"), tmp_path, "not one that torch.save")
    torch.save({"model": {"a": torch.ones(2)}, "epoch": 3}, file)
    refused(file.read_bytes(), tmp_path, "Save model.state_dict")
    torch.save(torch.ones(3), file)
    refused(file.read_bytes(), tmp_path, "not a state dict")
    torch.save(torch.nn.Linear(2, 2), file)
    refused(file.read_bytes(), tmp_path, "refused")


def test_random_damage_never_escapes(tmp_path):
    """Flipped bytes give an array or a PickleError, nothing else."""
    rng = np.random.default_rng(0)
    for new in (True, False):
        torch.save({"a": torch.ones(4, 4), "b": torch.ones(3)}, tmp_path / "w.bin", _use_new_zipfile_serialization=new)
        data = np.frombuffer((tmp_path / "w.bin").read_bytes(), np.uint8)
        for _ in range(300):
            broken = data.copy()
            broken[rng.integers(0, len(data), 3)] = rng.integers(0, 256, 3)
            (tmp_path / "x.bin").write_bytes(broken.tobytes())
            try:
                assert sum(x.size for x in read(tmp_path / "x.bin").values()) < 100
            except PickleError:
                pass
