"""Makes a small wav2vec2 CTC model out of Whisper's encoder: its layers, behind convolutions on the waveform.

    python scripts/from_whisper.py configs/from_whisper.yaml [key=value ...] [--student FOLDER]

Whisper's encoder layers are those of wav2vec2 with `do_stable_layer_norm`, so they are copied (of each feed-forward
block the units that matter most on the data). What cannot be copied is what comes before: log-mel features, two
convolutions and absolute positions, where wav2vec2 has convolutions on the waveform and a convolution for position.
That is learned: the student's embedding, the outputs of its layers and the normed last one become Whisper's, on data
without texts (layerwise distillation; per channel, relative to its variance). Whisper's states carry their position:
its mean over other speech is taken off (over --windows of 30 s that are joined of the data); what is left of a clip
changes by 5 to 20 % of its variance with its place in the window, before by more than all of it. Both models see the
same samples: frame i is centred on sample 320 i + 200. The first convolution begins as Gabor filters of 15 ms on the
mel scale, four phases each, the head as noise. All of this is ours.

In order: `options.layers=0` (the embedding alone, a fifth of the time); all states, `--student` what came out;
then CTC with `options.task_weight=1`, or `jaxslim train`, at rates that leave the states where they are.
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim import config, hub, recipe, scratch
from jaxslim.data import mel, task_of
from jaxslim.methods.finetune import ctc
from jaxslim.methods.generate import fresh
from jaxslim.models import bind
from jaxslim.models import layers as L
from jaxslim.models.wav2vec2 import frames
from jaxslim.slim import Method, Slim, Term, inputs
from jaxslim.train import loop
from jaxslim.train import mesh as M

LEVEL = 0.05   # root mean square of what Whisper hears: the clips come with 1
SHIFT = 200    # samples from the start of a wav2vec2 frame's field to its centre
STRIDE = 320   # samples from frame to frame, of both
POSITION = "aux.position."
FRONT = dict(conv_dim=[320, 256, 256], conv_kernel=[240, 1, 1, 2], conv_stride=[160, 1, 1, 2])   # and the width
NAMES = {"self_attn": "attention", "self_attn_layer_norm": "layer_norm", "fc1": "feed_forward.intermediate_dense",
         "fc2": "feed_forward.output_dense", "final_layer_norm": "final_layer_norm"}


def hear(teacher: Slim, wave: jax.Array, count: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """States of Whisper for the first `count` frames of wave (B, samples): the embedding without positions, the layers'
    outputs, the last one normed, (B, count, D) each; and the activations of the feed-forward blocks (B, count, F)."""
    model = bind.bind(teacher.spec, teacher.params)   # which leaves aux.* alone
    encoder = getattr(model, "model", model).encoder
    wave = jnp.pad(LEVEL * wave[:, SHIFT:], ((0, 0), (0, SHIFT + STRIDE)))[:, : STRIDE * count]
    x = jnp.swapaxes(mel._log_mel(wave, teacher.spec["num_mel_bins"], "float32"), 1, 2)       # (B, 2 count, mels)
    x = L.gelu(encoder.conv2(L.gelu(encoder.conv1(x, 1, 1)), 2, 1))
    states, inner, x = [x], [], x + encoder.embed_positions()[:count]
    for layer in encoder.layers:
        x, taps, _ = layer(x, None, L.Call(taps=frozenset([f"{layer.name}.ffn.in"])))
        inner.append(layer.act(layer.fc1(taps[f"{layer.name}.ffn.in"])))
        states.append(x)
    return [*states[:-1], encoder.layer_norm(x)], inner


def with_positions(teacher: Slim, batches, windows: int) -> Slim:
    """The teacher with `aux.position.I` (frames, D): what position adds to state I, the mean over windows of speech
    less the mean over frames; for the embedding, which has none yet, less the mean of the table."""
    count = teacher.spec["max_source_positions"] - 1
    measure = jax.jit(lambda teacher, wave: [x.sum(0) for x in hear(teacher, wave, count)[0]])
    speech, sums, done, many = np.zeros(0, np.float32), None, 0, 4 * STRIDE * (count + 1)
    for batch in batches:
        clips = [w[m > 0] for w, m in zip(batch["input_values"], batch["attention_mask"], strict=True)]
        speech = np.concatenate([speech, *clips])
        while len(speech) >= many and done < windows:
            new = [np.asarray(x) for x in measure(teacher, speech[:many].reshape(4, -1))]
            sums = new if sums is None else [a + b for a, b in zip(sums, new, strict=True)]
            speech, done = speech[many:], done + 4
        if done >= windows:
            break
    means = [s / done - (s / done).mean(0) for s in sums]
    at = np.asarray(teacher.params["model.encoder.embed_positions.weight"])
    means[0] = np.broadcast_to(-at.mean(0), at.shape)
    return teacher.replace(params=teacher.params | {f"{POSITION}{i}": np.float32(m) for i, m in enumerate(means)})


def gabor(channels: int, size: int) -> np.ndarray:
    """Filters (channels, 1, size): bands of equal width in mel from 60 to 7600 Hz, each in four phases."""
    low, high = (2595 * np.log10(1 + f / 700) for f in (60, 7600))
    edges = 700 * (10 ** (np.linspace(low, high, channels // 4 + 2) / 2595) - 1)
    t = (np.arange(size) - (size - 1) / 2) / mel.RATE
    width = np.minimum(size / mel.RATE, 4 / (edges[2:] - edges[:-2]))[:, None, None]                # seconds
    window = np.where(np.abs(t) < width / 2, 0.5 + 0.5 * np.cos(2 * np.pi * t / width), 0)
    wave = window * np.cos(2 * np.pi * edges[1:-1, None, None] * t + np.pi / 2 * np.arange(4)[:, None])
    wave *= np.sqrt(edges[1:-1, None, None] / 500 + 0.5) / np.linalg.norm(wave, axis=-1, keepdims=True)  # speech falls
    return wave.reshape(channels, 1, size).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class FromWhisper(Method):
    units: int = 1280           # of every feed-forward block
    layers: int = -1            # how many of Whisper's states are learned after the embedding; -1: all
    state_weight: float = 1.0   # of each of them
    task_weight: float = 0.0    # of CTC, on data with texts

    def student(self, teacher: Slim, stock: Slim, batches, key) -> Slim:
        """The student, with the vocabulary of `stock`."""
        t, count = teacher.spec, teacher.spec["encoder_layers"]
        spec = stock.spec.replace(config={
            **stock.spec.config, **FRONT, "conv_dim": [*FRONT["conv_dim"], t["d_model"]],
            "num_feat_extract_layers": len(FRONT["conv_kernel"]), "feat_extract_norm": "layer", "conv_bias": True,
            "do_stable_layer_norm": True, "hidden_size": t["d_model"], "num_hidden_layers": count,
            "num_attention_heads": t["encoder_attention_heads"], "intermediate_size": self.units,
            "num_conv_pos_embeddings": 48, "layer_norm_eps": 1e-5, "mask_time_prob": 0.01, "mask_time_min_masks": 0,
            # dropout of a state whose channels have large means is mostly noise
            **dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0)})
        first = "wav2vec2.feature_extractor.conv_layers.0."
        filters = gabor(FRONT["conv_dim"][0], FRONT["conv_kernel"][0])
        copied = {first + "conv.weight": filters, first + "layer_norm.weight": np.full(len(filters), 2, np.float32),
                  first + "conv.bias": np.asarray(0.3 * jax.random.normal(key, len(filters)))}   # tells loud from soft
        for i, (mean, square) in enumerate(self.activity(teacher, spec, batches)):
            old, new = f"model.encoder.layers.{i}.", f"wav2vec2.encoder.layers.{i}."
            own = {k.removeprefix(old): np.asarray(v) for k, v in teacher.params.items() if k.startswith(old)}
            out = own["fc2.weight"]                                                            # (D, F)
            keep = np.sort(np.argsort(-square * (out**2).sum(0))[: self.units])
            own["fc2.bias"] = own["fc2.bias"] + np.delete(out, keep, 1) @ np.delete(mean, keep)
            own |= {k: own[k][keep] for k in ("fc1.weight", "fc1.bias")} | {"fc2.weight": out[:, keep]}
            own["self_attn.k_proj.bias"] = np.zeros_like(own["self_attn.q_proj.bias"])
            for name, value in own.items():
                owner, _, rest = name.partition(".")
                copied[f"{new}{NAMES[owner]}.{rest}"] = value
        for side in ("weight", "bias"):
            copied[f"wav2vec2.encoder.layer_norm.{side}"] = teacher.params[f"model.encoder.layer_norm.{side}"]
        params = {}
        for i, (name, want) in enumerate(bind.shapes(spec).items()):
            draw = jax.random.fold_in(key, i)
            if name in copied:
                params[name] = copied[name]
            elif "feature_extractor" in name and len(want.shape) == 3:
                scale = (2 / (want.shape[1] * want.shape[2])) ** 0.5
                params[name] = np.asarray(scale * jax.random.normal(draw, want.shape))
            else:
                params[name] = fresh(name, want, draw, spec)
        return Slim(spec, params)

    def activity(self, teacher: Slim, spec, batches, limit: int = 8) -> list[np.ndarray]:
        """(mean, mean square) (2, F) of every layer's feed-forward units over some batches."""
        sums, total = None, 0.0
        measure = jax.jit(lambda teacher, wave, count: hear(teacher, wave, count)[1], static_argnames="count")
        for _, batch in zip(range(limit), batches, strict=False):
            count = frames(spec, batch["input_values"].shape[1])
            mask = np.arange(count) < np.asarray(frames(spec, batch["attention_mask"].sum(-1)))[:, None]
            inner = measure(teacher, batch["input_values"], count)
            new = [np.stack([(np.asarray(x)[mask] ** p).sum(0) for p in (1, 2)]) for x in inner]
            sums, total = new if sums is None else [a + b for a, b in zip(sums, new)], total + mask.sum()
        return [x / total for x in sums]

    def targets(self, teacher: Slim, batch, key, step):
        wave = batch["input_values"]
        states, _ = hear(teacher, wave, (wave.shape[1] - 2 * SHIFT) // STRIDE + 1)
        return {str(i): x - teacher.params[f"{POSITION}{i}"][: x.shape[1]] for i, x in enumerate(states)}

    def loss(self, student: Slim, targets, batch, key, step) -> dict[str, Term]:
        count = student.spec["num_hidden_layers"]
        taps = ("embedding", *(f"encoder.{i}" for i in range(count - 1)))
        out = student(taps=taps, key=key, **inputs(batch))
        mask = (jnp.arange(targets["0"].shape[1]) < out.lengths[:, None])[..., None]                # (B, T, 1)
        states, terms = [*(out.taps[t] for t in taps), out.last_hidden_state], {}
        for i in range((count if self.layers < 0 else self.layers) + 1):
            want, valid = targets[str(i)], mask.sum()
            mean = jnp.where(mask, want, 0).sum((0, 1)) / valid
            variance = jnp.where(mask, (want - mean) ** 2, 0).sum((0, 1)) / valid                   # (D,)
            error = jnp.where(mask, (states[i] - want) ** 2, 0).sum((0, 1)) / (variance + 1e-2 * variance.mean())
            terms[str(i)] = Term(error.mean(), valid.astype(jnp.float32), self.state_weight)
        if self.task_weight:
            terms |= {k: t._replace(weight=self.task_weight * t.weight) for k, t in ctc(student, out, batch).items()}
        return terms

    def labelled(self) -> bool:
        return self.task_weight > 0

    def group(self, name: str) -> str:
        if name.startswith("lm_head") and not self.task_weight:
            return "frozen"
        return "layers" if ".encoder.layer" in name else "front"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--student", help="what this script made before, to be trained on")
    parser.add_argument("--stock", default="bundled:wav2vec2-ctc-en", help="its tokenizer is taken")
    parser.add_argument("--windows", type=int, default=64, help="of 30 s, for the means of positions")
    args = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO)
    cfg = config.load(config.Run, args.config, args.overrides)
    teacher, method = hub.load(cfg.model), config.build(FromWhisper, cfg.options)
    stock = hub.load(args.student or args.stock)
    task, mesh = task_of(stock.spec, hub.folder(args.stock)), M.make(cfg.mesh)
    make = functools.partial(recipe.training_batches, cfg.data.train, task, cfg, mesh, method.labelled())
    teacher = with_positions(teacher, make(), args.windows)
    student = stock if args.student else method.student(teacher, stock, make(), jax.random.key(cfg.seed))
    student = scratch.changed(student, cfg.model_config)
    trained = loop.run(method, student, teacher, cfg, make(), cfg.output_dir, mesh=mesh, name="from_whisper",
                       validate=recipe.validation(cfg.data.validation, task))
    hub.save(trained, f"{cfg.output_dir}/final", source=args.stock)


if __name__ == "__main__":
    main()
