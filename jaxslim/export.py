"""Models for other programs: `hf` (opened by transformers, without jaxslim), `hf-dense` (in the stock shape),
`stablehlo` (one program for CPU, GPU and TPU), `onnx`, and bundles for `sherpa-onnx` and `onnx-asr`.

Every export is opened again, with PyTorch, where it is installed, or the program that it is for, and compared with this
library on a fixed input or on bundled speech; `parity.json` beside the model records the result. One that differs by
more than TOLERANCE is not kept.
"""
from __future__ import annotations

import json
import os
import pathlib
import platform
from typing import Any

import jax
import numpy as np

from jaxslim import __version__, formulas, hub, onnx_bundles, onnx_graph, stablehlo, torch_code
from jaxslim.dense import ExportError, expand, fold
from jaxslim.methods.quantize import dequantize
from jaxslim.slim import Slim
from jaxslim.spec import Spec, nearest

GRAPHS = ("onnx", *onnx_bundles.BUNDLES)
FORMATS = ("hf", "hf-dense", "stablehlo", *GRAPHS)
TOLERANCE = 1e-4   # of max(1, max abs of the reference), DESIGN 6
PARITY = "parity.json"


class ParityError(ExportError):
    """The exported model does not compute what the model computes."""


def export(model: Slim, folder: str | os.PathLike, *, format: str = "hf", source: str | os.PathLike | None = None,
           dtype: Any = None, force: bool = False, check: bool = True) -> dict[str, Any]:
    """Writes `model` in another form, opens it again and compares.

    Args:
      model: any model. `hf` writes a stock model where the changes allow it (all feed-forwards equally wide, fewer
        front-end channels), else one that opens with `trust_remote_code=True`; `hf-dense` fills pruned and factored
        blocks up to the stock shape. Both write int8 weights as the floats that they stand for.
      folder: as in `hub.save`.
      format: one of FORMATS.
      source: folder or name of a model whose tokenizer, processor and generation files are copied along.
      dtype: of the stored floats; None = as they are. Of GRAPHS float32 or "int8": onnxruntime's dynamic quantisation,
        which is compared too, but not held to TOLERANCE.
      force: keep an export that differs by more than TOLERANCE.
      check: open and compare; False writes only.
    Returns:
      What `parity.json` says.
    Raises:
      ExportError: the model cannot take this form.
      ParityError: the difference is too large; `folder` is as it was before.
    """
    if format not in FORMATS:
        raise ExportError(f"Unknown format {format!r}; known are {', '.join(FORMATS)}.{nearest(format, FORMATS)}")
    int8 = str(dtype) == "int8"
    if int8 and format not in GRAPHS or format in GRAPHS and str(dtype) not in ("None", "float32", "int8"):
        raise ExportError(f"{format}: weights of type {dtype} are not written; ONNX graphs are float32 or int8, the "
                          "other formats float32, float16 or bfloat16. For int8 in this library use method: quantize.")
    if format != "stablehlo" and any("int8" in fields for fields in model.spec.blocks.values()):
        model = dequantize(model)
    if format == "stablehlo":
        out = model
    elif format == "hf-dense":
        out = expand(model)
    else:
        stock = fold(model.spec)
        if stock is None and (reason := torch_code.unsupported(model.spec)):
            raise ExportError(f"hf: {reason}")
        out = model if stock is None else model.replace(spec=stock)
    if format in GRAPHS:
        onnx_graph.require()
        if reason := onnx_graph.unsupported(out.spec):
            raise ExportError(f"{format}: {reason}")
        dtype = None
    record = {"format": format, "fingerprint": model.fingerprint, "family": model.spec.family,
              "class": hub._architecture(model.spec.family, model.spec.head),
              "trust_remote_code": bool(out.spec.blocks), "tolerance": TOLERANCE,
              "versions": {"jaxslim": __version__, "jax": jax.__version__, "python": platform.python_version()}}

    def verify(path: pathlib.Path) -> None:
        if format == "stablehlo":
            record.update(_program(model, path))
        elif format in GRAPHS:
            record.update(_graph(model, out.spec, path, format, int8, check), trust_remote_code=False)
        else:
            record.update(_compare(model, out, path) if check else {"checked": False, "reason": "not asked for"})
        worst = max((record[k] for k in ("relative_difference", "relative_change") if k in record), default=0.0)
        if not worst <= TOLERANCE and not force:
            raise ParityError(f"{folder}: its outputs differ by {worst:.1e} of max(1, max abs), more than "
                              f"{TOLERANCE:g}; nothing was written. With --force it is kept.")
        said = [d for d in record.get("transcripts", {}).get("different", ()) if d["margin"] >= onnx_bundles.MARGIN]
        if said and not force:
            raise ParityError(f"{folder}: {record['transcripts']['package']} transcribes {len(said)} bundled clips "
                              f"otherwise ({said[0]['package']!r}, here {said[0]['jaxslim']!r}); nothing was written. "
                              "With --force it is kept.")
        (path / PARITY).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    hub.save(out, folder, source=source, dtype=dtype, verify=verify)
    return record


def example(spec: Spec) -> dict[str, np.ndarray] | None:
    """Fixed inputs of a model: two rows, the second one padded; None for a family that is not known here."""
    rng = np.random.default_rng(0)

    def padded(length: int, *shape: int) -> dict[str, np.ndarray]:
        mask = (np.arange(length) < np.array([[length], [length * 3 // 5]])).astype(np.int32)
        values = rng.standard_normal((2, length, *shape)).astype(np.float32)
        values = np.where(mask.reshape(2, length, *[1] * len(shape)) == 1, values, np.float32(0))
        return {"values": values, "attention_mask": mask}

    if spec.family not in formulas.FORMULAS:
        return None
    taken = formulas.inputs(spec, 1.0, 2)
    if "input_values" in taken:
        x = padded(16000)
        return {"input_values": x["values"], "attention_mask": x["attention_mask"]}
    if spec.family == "whisper":
        ids = rng.integers(0, spec["vocab_size"], (2, 8)).astype(np.int32)
        shape = (2, spec["num_mel_bins"], 2 * spec["max_source_positions"])
        return {"input_features": rng.standard_normal(shape).astype(np.float32), "decoder_input_ids": ids}
    if "audio_mel" in taken:
        x = padded(200, spec["input_feat_size"])
        return {"audio_mel": x["values"], "audio_mel_mask": x["attention_mask"] == 0}
    if "input_features" in taken:
        x = padded(200, spec[formulas.FEATURES[spec.family]])
        return {"input_features": x["values"], "attention_mask": x["attention_mask"]}
    length = min(24, spec["max_position_embeddings"] - 4)
    mask = padded(length)["attention_mask"]
    ids = rng.integers(min(5, spec["vocab_size"] - 1), spec["vocab_size"], (2, length))
    return {"input_ids": np.where(mask == 1, ids, spec.get("pad_token_id") or 0).astype(np.int32),
            "attention_mask": mask}


def _compare(model: Slim, out: Slim, path: pathlib.Path) -> dict[str, Any]:
    """Differences between `model`, `out` and what PyTorch makes of the folder `path`."""
    inputs = example(out.spec)
    if inputs is None:
        return {"checked": False, "reason": f"no fixed input for {out.spec.family}"}
    result: dict[str, Any] = {"input": {k: list(v.shape) for k, v in inputs.items()}}
    if out.spec != model.spec:  # another shape: in this library, before anything is rounded to a storage type
        change = _difference(_ours(model, inputs), _ours(out, inputs))
        result |= {"relative_change": change["relative_difference"]}
    try:
        import torch
        import transformers
    except ImportError:
        return {**result, "checked": False, "reason": "PyTorch is not installed"}
    result["versions"] = {"jaxslim": __version__, "jax": jax.__version__, "python": platform.python_version(),
                          "torch": torch.__version__, "transformers": transformers.__version__}
    theirs = _theirs(path, out.spec, inputs)
    return {**result, "checked": True, **_difference(_ours(hub.load(path), inputs), theirs)}


def _program(model: Slim, path: pathlib.Path) -> dict[str, Any]:
    """Writes the StableHLO program and compares it, read back, at a shape that it was not traced with."""
    inputs = example(model.spec)
    if inputs is None:
        raise ExportError(f"stablehlo: no fixed input for {model.spec.family}.")
    size = stablehlo.write(model, path, inputs)
    out = stablehlo.read(path)(**inputs)
    theirs = np.asarray(out.get("logits", out["last_hidden_state"]), np.float32)
    return {"input": {k: list(v.shape) for k, v in inputs.items()}, "checked": True, "bytes": size,
            "platforms": list(stablehlo.PLATFORMS), "trust_remote_code": False,
            **_difference(_ours(hub.load(path), inputs), theirs)}


def _graph(model: Slim, spec: Spec, path: pathlib.Path, format: str, int8: bool, check: bool) -> dict[str, Any]:
    """Writes the ONNX graph of the Hugging Face folder `path` in the place of its weights and code, and compares."""
    task, files, outputs = None, {}, ("logits" if spec.head != "none" else "last_hidden_state")
    if format == "onnx":
        inputs = example(spec)
        if inputs is None:
            raise ExportError(f"onnx: no fixed input for {spec.family}.")
        module = onnx_graph.wrapped(_open(path, spec), outputs, tuple(inputs))
        (path / hub.CONFIG).write_text(json.dumps(hub.read_config(path), indent=2, sort_keys=True) + "\n")
    else:
        from jaxslim.data import CTCTask

        task = CTCTask.from_pretrained(path, spec.family)
        if reason := onnx_bundles.unsupported(spec, format, task):
            raise ExportError(f"{format}: {reason}")
        files = onnx_bundles.files(spec, format, task)
        module, inputs, outputs = onnx_bundles.graph(format, _open(path, spec), task)
    record: dict[str, Any] = {"versions": {"jaxslim": __version__, "jax": jax.__version__,
                                           "python": platform.python_version(), **onnx_graph.versions()},
                              "opset": onnx_graph.write(module, inputs, outputs, path / onnx_graph.GRAPH)}
    batches = list(onnx_graph.batches(spec, path)) if task is None else []  # before the files that say how are gone
    kept = {"LICENSE", "NOTICE", *files} if files else set(hub.OURS) - {hub.WEIGHTS, *torch_code.FILES}
    for file in path.iterdir():
        if file.name not in kept and not file.name.startswith(onnx_graph.GRAPH):
            file.unlink()
    for name, text in files.items():
        (path / name).write_text(text, encoding="utf-8")

    def compared(name: str) -> dict[str, Any]:
        graph = {"file": name, "bytes": sum(f.stat().st_size for f in path.glob(f"{name}*"))}
        if not check:
            return graph | {"checked": False, "reason": "not asked for"}
        found = (onnx_graph.compare(model, onnx_graph.read(path / name), batches) if task is None else
                 onnx_bundles.compare(model, task, path, format, name))
        return graph | {"checked": True} | found

    if int8:  # the float graph is compared all the same: it says whether the difference is the rounding's
        onnx_graph.quantize(path / onnx_graph.GRAPH, path / onnx_graph.INT8)
    record |= compared(onnx_graph.GRAPH)
    if int8:
        for file in path.glob(f"{onnx_graph.GRAPH}*"):
            file.unlink()
        record["int8"] = compared(onnx_graph.INT8)
    return record


def _ours(model: Slim, inputs) -> tuple[np.ndarray, np.ndarray]:
    """Logits (or last hidden state) in fp32, and which of their positions are valid."""
    out = model(**inputs, dtype="float32")
    y = np.asarray(out.last_hidden_state if out.logits is None else out.logits, np.float32)
    valid = np.ones(y.shape[:-1], bool)
    if y.ndim == 3 and out.lengths is not None:
        valid = np.arange(y.shape[1]) < np.asarray(out.lengths)[:, None]
    elif "attention_mask" in inputs and inputs["attention_mask"].shape == valid.shape:
        valid = inputs["attention_mask"] == 1
    return y, valid


def _theirs(path: pathlib.Path, spec: Spec, inputs) -> np.ndarray:
    return _open(path, spec, inputs)


def _open(path: pathlib.Path, spec: Spec, inputs=None):
    """The torch model of a folder; with `inputs` what it makes of them. Raises ParityError."""
    import torch
    import transformers
    from transformers.utils import logging

    architecture = hub._architecture(spec.family, spec.head)
    name = torch_code.auto_class(spec, architecture) if spec.blocks else architecture
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        torch_model = getattr(transformers, name).from_pretrained(
            path, dtype=torch.float32, **({"trust_remote_code": True} if spec.blocks else {})).eval()
        if inputs is None:
            return torch_model
        with torch.no_grad():
            out = torch_model(**{k: onnx_graph.tensor(v) for k, v in inputs.items()})
    except Exception as error:
        raise ParityError(f"transformers {transformers.__version__} cannot open or run what was written "
                          f"({type(error).__name__}: {str(error).strip()[:300]}).") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()


def _difference(ours: tuple[np.ndarray, np.ndarray], theirs) -> dict[str, float]:
    (have, valid), want = ours, theirs[0] if isinstance(theirs, tuple) else theirs
    have, want = have[valid].astype(np.float64), want[valid].astype(np.float64)
    scale = float(np.abs(want).max())
    difference = float(np.abs(have - want).max())
    return {"max_difference": difference, "max_abs": scale, "relative_difference": difference / max(1.0, scale),
            "argmax_agreement": float((have.argmax(-1) == want.argmax(-1)).mean())}
