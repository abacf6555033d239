"""A model as an ONNX graph with batch and time left open: traced by PyTorch's exporter from the Hugging Face folder
that `export` writes (stock class or generated code), run by onnxruntime, compared with this library on real speech.

Inputs are named and shaped as in transformers (`input_values` or `input_features`, `attention_mask`, int64), the
output is `logits` or `last_hidden_state`. `bundle` is what the graph is made for: None, or one of onnx_bundles.py.
"""
from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxslim import torch_code
from jaxslim.dense import ExportError
from jaxslim.models import recurrent
from jaxslim.models.roles import blocks as every_block
from jaxslim.spec import Spec, kind

GRAPH, INT8 = "model.onnx", "model.int8.onnx"
INSTALL = "ONNX graphs need onnx, onnxscript, onnxruntime and torch: pip install jaxslim[export]"
PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
CLIPS = ((0,), (1, 5), (2, 9, 13, 17))   # rows of bundled speech of each batch that is compared: sizes 1, 2, 4


def unsupported(spec: Spec) -> str | None:
    """Why no graph can be written, in a sentence; None when one can, as far as the Spec tells."""
    if spec.head == "seq2seq":
        return (f"{spec.family} is an encoder with a decoder that runs step by step; only models of one pass become a "
                "graph in this release. Export it with --format hf and use optimum.")
    if spec.generator is not None:
        return "A generative student generates one layer from those before it, which no graph was tried for yet."
    if spec.blocks and (reason := torch_code.unsupported(spec)):
        return reason
    for block in (b for b in every_block(spec) if kind(b) == "attention"):
        a = spec.attention(block)
        loop = (a.mixer if a.mixer in recurrent.KINDS else
                "causal linear attention" if a.options.get("causal") else "")
        if a.heads and loop:
            return (f"Block {block} has {loop}, whose PyTorch code loops over chunks of frames, so its graph would be "
                    "of one length. --format stablehlo leaves the length open.")
    return None


def write(module, inputs: Mapping[str, np.ndarray], output: str, path: str | os.PathLike) -> int:
    """Traces a torch module (*inputs) -> tensor into the file `path`, with axes 0 and 1 of every input left open.

    Returns: the opset. Raises ExportError: a package is missing, or the exporter cannot leave a shape open.
    """
    require()
    import torch

    axes = tuple({i: torch.export.Dim.DYNAMIC for i in range(min(v.ndim, 2))} for v in inputs.values())
    with quiet():
        try:
            with torch.no_grad():
                program = torch.onnx.export(
                    module.eval(), tuple(map(tensor, inputs.values())), dynamic_shapes=(axes,), dynamo=True,
                    input_names=list(inputs), output_names=[output], verbose=False)
            graph = program.model.graph
            for value in (*graph.inputs, *graph.outputs):  # names for what the exporter calls s6, s76
                own = ("batch", "time") if value.name in inputs else ("batch", "frames")
                if value.name in inputs or len(value.shape) > 2:
                    value.shape = type(value.shape)([*own[: len(value.shape)], *list(value.shape)[2:]])
            program.save(os.fspath(path))
        except Exception as error:  # the exporter's own classes are not public; its last lines name the cause
            lines = [line for line in str(error.__cause__ or error).splitlines() if line.strip()]
            raise ExportError(f"onnx: PyTorch's exporter cannot trace this model with open shapes "
                              f"({type(error.__cause__ or error).__name__}: {' '.join(lines[:2])[:300]}).") from error
    return int(program.model.opset_imports[""])


def quantize(source: pathlib.Path, target: pathlib.Path) -> None:
    """int8 by onnxruntime: weights of the matrix products per output, activations per tensor as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(source, target, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
                         weight_type=QuantType.QInt8, use_external_data_format=source.stat().st_size > 2**30)


def read(path: str | os.PathLike) -> Callable[..., np.ndarray]:
    """The graph of a file, or of a folder that holds one, on the CPU: (**inputs as arrays) -> its first output.

    Raises ExportError: there is no graph, or onnxruntime cannot open it.
    """
    require()
    import onnxruntime

    path = pathlib.Path(path)
    if path.is_dir():
        path = next((path / name for name in (GRAPH, INT8) if (path / name).exists()), path / GRAPH)
    if not path.exists():
        raise ExportError(f"{path.parent} has no {GRAPH}; make one with `jaxslim export MODEL DST --format onnx`.")
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # pybind classes without a common base
        raise ExportError(f"onnxruntime {onnxruntime.__version__} cannot open {path}: "
                          f"{str(error).strip().splitlines()[0][:200]}.") from error
    names = [x.name for x in session.get_inputs()]
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    kinds = {x.name: types[x.type] for x in session.get_inputs()}
    return lambda **inputs: session.run(None, {k: np.asarray(inputs[k], kinds[k]) for k in names})[0]


def batches(spec: Spec, folder: str | os.PathLike) -> Iterator[dict[str, np.ndarray]]:
    """Inputs to compare on: bundled speech in batches of CLIPS as the extractor of `folder` makes them; for a model
    that takes no audio, or features of an extractor that is not there, fixed random ones."""
    from jaxslim.data import DataError
    from jaxslim.data.extractor import KINDS, Extractor
    from jaxslim.export import example

    fixed = example(spec)
    if fixed is None:
        raise ExportError(f"onnx: no fixed input for {spec.family}.")
    try:
        extractor = Extractor.from_pretrained(folder, spec.family)
    except DataError:
        extractor = None if spec.family in KINDS else Extractor()
    if extractor is None or not {"input_values", "input_features"} & fixed.keys():
        yield fixed
        yield {k: v[:1, : v.shape[1] // 2] for k, v in fixed.items()}
        return
    waves = speech([i for rows in CLIPS for i in rows], extractor.sampling_rate)
    for rows in CLIPS:
        some = [waves[i] for i in rows]
        yield extractor(some, max(len(w) for w in some))


def speech(rows, rate: int = 16000) -> dict[int, np.ndarray]:
    """Bundled clips of the validation split."""
    from jaxslim.data import load_rows

    data = load_rows("bundled:prompts-en/validation")
    return {i: data.audio(i, rate) for i in rows}


def wrapped(model, output: str, names: tuple[str, ...]):
    """A transformers model as a torch module from its inputs by name to one tensor."""
    import torch

    class Graph(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *values):
            return getattr(self.model(**dict(zip(names, values)), return_dict=True), output)

    return Graph()


def tensor(value: np.ndarray):
    """As the graph takes it: integers as int64."""
    import torch

    return torch.from_numpy(value.astype(np.int64) if value.dtype == np.int32 else value)


def require() -> None:
    """Raises ExportError with the install line when a package is missing."""
    missing = [name for name in PACKAGES if not importlib.util.find_spec(name)]
    if missing:
        raise ExportError(f"{INSTALL} ({', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed)")


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


@contextlib.contextmanager
def quiet():
    """Without the exporters' progress lines and their warnings about code that is not ours."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def compare(model, run: Callable[..., np.ndarray], batches: Iterable[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Differences between a model and a graph over several batches, each and the worst of them."""
    from jaxslim.export import _difference, _ours

    return worst([{"shape": list(next(iter(batch.values())).shape), **_difference(_ours(model, batch), run(**batch))}
                  for batch in batches])


def worst(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest difference, the least agreement, and the rows."""
    return {**{k: max(r[k] for r in rows) for k in ("max_difference", "max_abs", "relative_difference")},
            "argmax_agreement": min(r["argmax_agreement"] for r in rows), "compared": rows}
