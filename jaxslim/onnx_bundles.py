"""CTC models of waveforms as folders that other programs transcribe with, unchanged: sherpa-onnx and onnx-asr.

* sherpa-onnx: `model.onnx` (x (1, samples) -> logits) and `tokens.txt`, as its kind "omnilingual ASR CTC" wants them,
  the only one of its offline kinds that gives a model samples and no filter-bank features. It brings each clip to mean
  0 and variance 1 with 1e-5 under the root, Wav2Vec2FeatureExtractor with 1e-7; so the graph normalises once more.

      sherpa_onnx.OfflineRecognizer.from_omnilingual_asr_ctc("model.onnx", "tokens.txt")

* onnx-asr: `model.onnx` (input_values (B, samples), input_lengths (B,) -> logprobs), `vocab.txt` and `config.json` of
  its type "wav2vec2-ctc" (istupakov/onnx-asr, pull request 135; merged, but not in release 0.12.0, which takes no
  waveform at 16 kHz). Normalisation is in the graph. `onnx_asr_model` opens the folder with the type of the package, or
  with the same few lines on the package's own CTC decoder where the release lacks it.
"""
from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxslim import onnx_graph
from jaxslim.dense import ExportError
from jaxslim.spec import Spec
from jaxslim.stream import geometry

BUNDLES = {"sherpa-onnx": "sherpa_onnx", "onnx-asr": "onnx_asr"}   # format -> package
BLANK, SPACE, OFF = "<blk>", "▁", -1e4   # what both packages call the blank, the space; log probability of "never"
TYPE = "wav2vec2-ctc"
MARGIN = 1e-3   # of two logits: below, rounding decides


def unsupported(spec: Spec, format: str, task) -> str | None:
    """Why a model cannot be bundled, in a sentence."""
    if spec.head != "ctc" or not spec.get("conv_dim"):
        return f"{format} bundles are for CTC models of waveforms, and this is {spec.family} with head {spec.head}."
    if task.sampling_rate != 16000:
        return f"{format} feeds 16 kHz; this model wants {task.sampling_rate} Hz."
    if format == "sherpa-onnx" and not task.extractor.do_normalize:
        return ("sherpa-onnx brings every clip to mean 0 and variance 1, and this model was trained without that "
                "(do_normalize false). --format onnx-asr can.")
    return None


def graph(format: str, model, task):
    """A transformers CTC model as the torch module that `format` runs, and its inputs and output."""
    import torch

    extractor, blank = task.extractor, task.blank_id

    def normalized(x, mask):  # over the valid samples; zeros beyond
        count = mask.sum(-1, keepdim=True).clamp_min(1)
        x = (x - (x * mask).sum(-1, keepdim=True) / count) * mask
        return x / ((x * x).sum(-1, keepdim=True) / count + 1e-7).sqrt()

    class Sherpa(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *values):                                                      # x (B, samples)
            (x,) = values
            return self.model(normalized(x, torch.ones_like(x))).logits

    class OnnxAsr(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *values):                                                      # (B, samples), (B,)
            x, lengths = values
            mask = torch.arange(x.shape[1])[None] < lengths[:, None]
            x = normalized(x, mask.to(x.dtype)) if extractor.do_normalize else x * mask.to(x.dtype)
            y = self.model(x, attention_mask=mask.long() if extractor.return_attention_mask else None).logits
            y = y.float().log_softmax(-1)                                                # (B, T, V)
            frames = self.model._get_feat_extract_output_lengths(lengths)
            valid = torch.arange(y.shape[1])[None] < frames[:, None]
            silence = torch.full((y.shape[2],), OFF)
            silence[blank] = 0.0                                                         # frames of padding: the blank
            return torch.where(valid[..., None], y, silence)

    x = np.random.default_rng(0).standard_normal((2, 16000)).astype(np.float32)
    if format == "sherpa-onnx":
        return Sherpa(), {"x": x}, "logits"
    return OnnxAsr(), {"input_values": x, "input_lengths": np.array([16000, 9000])}, "logprobs"


def files(spec: Spec, format: str, task) -> dict[str, str]:
    """File name -> text of what lies beside the graph. Raises ExportError for a vocabulary that cannot be written."""
    names = {BLANK if t == task.pad_token else SPACE if t == task.word_delimiter else t: i
             for t, i in task.vocabulary.items()}
    if task.do_lower_case:
        names = {t if t == BLANK else t.lower(): i for t, i in names.items()}
    if len(names) < len(task.vocabulary) or any(len(t.split()) != 1 for t in names):
        raise ExportError(f"{format}: the vocabulary has tokens that its token list cannot hold (white space, or two "
                          f"that become one as {BLANK}, {SPACE} or in lower case).")
    used = set(names.values())
    names |= {f"<unused{i}>": i for i in range(spec["vocab_size"]) if i not in used}  # outputs without a token
    listed = "".join(f"{token} {i}\n" for token, i in sorted(names.items(), key=lambda item: item[1]))
    if format == "sherpa-onnx":
        return {"tokens.txt": listed}
    config = {"model_type": TYPE, "subsampling_factor": geometry(spec)[0]}
    return {"vocab.txt": listed, "config.json": json.dumps(config, indent=2) + "\n"}


def logits(model, task, waves: Mapping[int, np.ndarray], rows: int = 8) -> dict[int, np.ndarray]:
    """Logits (T, V) of each clip, by this library: in batches of clips of like length where the model takes a mask."""
    from jaxslim.export import _ours

    masked, found = task.extractor.return_attention_mask, {}
    order = sorted(waves, key=lambda i: len(waves[i]))
    for group in (order[i : i + rows] for i in range(0, len(order), rows)) if masked else ([i] for i in order):
        longest = max(len(waves[i]) for i in group)
        inputs = task.extractor([waves[i] for i in group], -(-longest // 16000) * 16000 if masked else longest)
        if not masked:
            del inputs["attention_mask"]
        found |= {i: y[keep] for i, y, keep in zip(group, *_ours(model, inputs))}
    return found


def outputs(run: Callable[..., np.ndarray], format: str, waves: list[np.ndarray]) -> np.ndarray:
    """What the graph makes of clips, given as the package gives them: alone (sherpa-onnx), or a padded batch."""
    if format == "sherpa-onnx":
        (wave,) = waves
        return run(x=(wave - wave.mean())[None] / np.sqrt(wave.var() + 1e-5))
    lengths = np.array([len(wave) for wave in waves])
    return run(input_values=np.stack([np.pad(w, (0, lengths.max() - len(w))) for w in waves]), input_lengths=lengths)


def compare(model, task, folder: pathlib.Path, format: str, name: str) -> dict[str, Any]:
    """A bundle's graph and its package against this library, on bundled speech."""
    from jaxslim.export import _difference

    run, waves, rows = onnx_graph.read(folder / name), clips(), []
    ours = logits(model, task, waves)
    batched = format == "onnx-asr" and task.extractor.return_attention_mask
    for group in onnx_graph.CLIPS if batched else [(i,) for i in waves]:
        theirs = outputs(run, format, [waves[i] for i in group])
        for i, y in zip(group, theirs):
            mine = ours[i] if format == "sherpa-onnx" else log_softmax(ours[i])
            rows.append({"clip": i, "rows": len(group), "frames": len(mine),
                         **_difference((mine, np.ones(len(mine), bool)), y[: len(mine)])})
    return {**onnx_graph.worst(rows), "transcripts": transcripts(ours, task, folder, format, waves)}


def log_softmax(y: np.ndarray) -> np.ndarray:
    y = y - y.max(-1, keepdims=True)
    return y - np.log(np.exp(y).sum(-1, keepdims=True))


def clips() -> dict[int, np.ndarray]:
    return onnx_graph.speech(i for rows in onnx_graph.CLIPS for i in rows)


def clean(text: str) -> str:
    """A transcript as both are compared: words with one space between."""
    return " ".join(text.split())


def recognizer(folder: str | pathlib.Path, format: str, threads: int = 1) -> Callable[[np.ndarray], str] | None:
    """Waveform (16 kHz) -> text, by the real package on a bundle; None where it is not installed. `threads`: of
    sherpa-onnx."""
    if not importlib.util.find_spec(BUNDLES[format]):
        return None
    folder = pathlib.Path(folder)
    if format == "onnx-asr":
        model = onnx_asr_model(folder)
        return lambda wave: model.recognize(np.asarray(wave, np.float32), sample_rate=16000)
    import sherpa_onnx

    path = next(folder / name for name in (onnx_graph.GRAPH, onnx_graph.INT8) if (folder / name).exists())
    model = sherpa_onnx.OfflineRecognizer.from_omnilingual_asr_ctc(str(path), str(folder / "tokens.txt"),
                                                                     num_threads=threads)

    def run(wave: np.ndarray) -> str:
        stream = model.create_stream()
        stream.accept_waveform(16000, np.asarray(wave, np.float32))
        model.decode_stream(stream)
        return stream.result.text

    return run


def onnx_asr_model(folder: str | pathlib.Path):
    """A bundle opened by onnx-asr, with `recognize` of a file, an array or a list of them."""
    import onnx_asr

    folder = pathlib.Path(folder)
    int8 = None if (folder / onnx_graph.GRAPH).exists() else "int8"
    try:
        return onnx_asr.load_model(TYPE, folder, quantization=int8, providers=["CPUExecutionProvider"])
    except onnx_asr.utils.ModelNotSupportedError:
        return _adapter(folder, int8)


def _adapter(folder: pathlib.Path, int8: str | None):
    """What onnx-asr 0.12 lacks, on its own base class, decoder and resampler."""
    import onnxruntime
    from onnx_asr.asr import _AsrWithCtcDecoding
    from onnx_asr.loader import Manager

    class Wav2Vec2Ctc(_AsrWithCtcDecoding):
        window_step = 1 / 16000   # its frames are counted in samples
        _preprocessor_name = "identity"
        _subsampling_factor = property(lambda self: self.config["subsampling_factor"])

        def __init__(self, files, make, options):
            super().__init__(files, make, options)
            self._model = onnxruntime.InferenceSession(files["model"], **options)

        @staticmethod
        def _get_model_files(quantization=None):
            return {"model": f"model{'?' + quantization if quantization else ''}.onnx", "vocab": "vocab.txt"}

        def _encode(self, waves, lengths):
            (y,) = self._model.run(["logprobs"], {"input_values": waves, "input_lengths": lengths.astype(np.int64)})
            return y, np.minimum(lengths // self._subsampling_factor + 1, y.shape[1]).astype(np.int64)

    from onnx_asr.resolver import Resolver

    manager = Manager(providers=["CPUExecutionProvider"])
    found = Resolver(Wav2Vec2Ctc, None, folder).resolve_model(quantization=int8)
    return manager._create_asr_adapter(Wav2Vec2Ctc(found, manager._create_preprocessor, manager.default_onnx_config))


def transcripts(ours: Mapping[int, np.ndarray], task, folder: pathlib.Path, format: str,
                waves: Mapping[int, np.ndarray]) -> dict[str, Any]:
    """How many clips the package transcribes as this library does from its logits `ours` (T, V), greedily. Of the
    others both transcripts, and the least distance of a frame's two best symbols: rounding decides below MARGIN."""
    run, name = recognizer(folder, format), BUNDLES[format].replace("_", "-")
    if run is None:
        return {"package": None, "reason": f"{name} is not installed"}
    different = []
    for i, wave in waves.items():
        mine, theirs = clean(task.transcript(ours[i].argmax(-1))), clean(run(wave))
        if mine != theirs:
            top = np.sort(ours[i], -1)
            different.append({"clip": i, "jaxslim": mine, "package": theirs,
                              "margin": float((top[:, -1] - top[:, -2]).min())})
    return {"package": f"{name} {importlib.metadata.version(name)}", "clips": len(waves), "different": different}
