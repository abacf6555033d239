"""Makes a small wav2vec2 CTC model out of Whisper's encoder: its layers, behind convolutions on the waveform.

    python scripts/from_whisper.py configs/from_whisper.yaml [key=value ...] [--student FOLDER]

Whisper's encoder layers are those of wav2vec2 with `do_stable_layer_norm`, so they are copied (of each feed-forward
block the units that matter most on the data), and so are its two convolutions. Their log-mel features are made of
wav2vec2's own parts (`log_mel`): nothing of the front end has to be learned. What cannot be copied is absolute
positions, where wav2vec2 has a convolution for position, which begins as nothing. So layers learn to do without: their
outputs and the normed last one become Whisper's, on data without texts (layerwise distillation; per channel, relative
to its variance). Whisper's states carry their position: its mean over other speech is taken off (over --windows of 30 s
that are joined of the data); what is left of a clip changes by 5 to 20 % of its variance with its place in the window,
before by more than all of it. Both models see the same samples: frame i is centred on sample 320 i + 520. The head
begins as noise. All of this is ours.

In order: all states; then, `--student` what came out, CTC with `options.task_weight=1`, or `jaxslim train`, at rates
that leave the states where they are.
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim import config, hub, recipe, scratch
from jaxslim.data import mel, task_of
from jaxslim.methods.finetune import ctc
from jaxslim.methods.generate import fresh
from jaxslim.models import bind, roles
from jaxslim.models import layers as L
from jaxslim.models.wav2vec2 import frames
from jaxslim.slim import Method, Slim, Term, inputs
from jaxslim.train import loop, losses
from jaxslim.train import mesh as M

LEVEL = 0.05   # root mean square of what Whisper hears: the clips come with 1
SHIFT = 520    # samples from the start of a wav2vec2 frame's field to its centre
STRIDE = 320   # samples from frame to frame, of both
POSITION = "aux.position."
FRONT = dict(conv_kernel=[1, mel.SIZE, 1, 1, 1, 3, 3], conv_stride=[1, mel.HOP, 1, 1, 1, 1, 2])
TINY = 1e-4             # of the first weights: group norm adds 1e-5 to a variance far below and so normalises nothing
THIN = 100              # bins of a window's spectrum from here on: every second one, mel bands are wide there
GAIN = 1e3              # of a window's spectrum: GELU is a square far below 1 and half a magnitude far above
STEPS, RATIO = 7, 4.0   # of a logarithm, and from one to the next
KERNEL = 48             # of the convolution for position
ABOVE = 6.0             # added to log-mel features: GELU leaves them as they are there
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


def log_mel(teacher: Slim, batches, frames: int = 10_000) -> dict[str, np.ndarray]:
    """Five convolutions (kernels 1, 400, 1, 1, 1) that make of a waveform what Whisper is fed with, plus ABOVE.

    First the wave with both signs, as GELU(x) - GELU(-x) = x; then bins of the Fourier transform of a window, in three
    phases: the sum of their GELUs is even, a square for small values and a magnitude for large ones. Then mel bands;
    then, of every band, steps of a logarithm: GELU(u) - GELU(u - 1) rises from 0 to 1, for u = band / RATIO^k; then
    their weights, by least squares on data. It explains 99.5 % of the variance of the features of speech.
    """
    mels, bank = teacher.spec["num_mel_bins"], mel.filters(teacher.spec["num_mel_bins"])             # (201, M)
    bins = np.flatnonzero(bank.any(1))
    kept = bins[(bins <= THIN) | ((bins - THIN) % 2 == 0) | (bins == bins[-1])]
    # what a bin that is left out would have given is the mean of its neighbours
    bank = np.stack([np.interp(bins, kept, unit) for unit in np.eye(len(kept))]) @ bank[bins]
    wave = mel._hann() * np.cos(
        2 * np.pi * (kept[:, None, None] * np.arange(mel.SIZE) / mel.SIZE + np.arange(3)[:, None] / 3))
    wave = wave.reshape(-1, 1, mel.SIZE)                                                              # (450, 1, 400)
    seen, want, count = [], [], 0
    for batch in batches:
        for clip, mask in zip(batch["input_values"], batch["attention_mask"], strict=True):
            clip = LEVEL * clip[mask > 0]
            if len(clip) < 2 * mel.SIZE:  # a filler
                continue
            pieces = np.lib.stride_tricks.sliding_window_view(clip, mel.SIZE)[:: mel.HOP]
            seen.append(np.asarray(L.gelu(GAIN * pieces @ wave[:, 0].T)).reshape(len(pieces), -1, 3).sum(-1) @ bank)
            want.append(np.asarray(mel.log_mel(clip[None, mel.SIZE // 2:], mels))[0].T[: len(pieces)])
            seen[-1], count = seen[-1][: len(want[-1])], count + len(want[-1])
        if count >= frames:
            break
    seen, want = np.concatenate(seen), np.concatenate(want)                                           # (N, M)
    scale = 1.5 * RATIO ** (STEPS - 1) / np.percentile(seen, 99.9, axis=0)
    lower, upper = np.zeros((2, STEPS, mels, mels))
    bias = np.zeros(mels)
    for i in range(mels):
        u = np.asarray(L.gelu(seen[:, i:i + 1] * scale[i])) * RATIO ** -np.arange(STEPS)
        low, high = np.asarray(L.gelu(u)), np.asarray(L.gelu(u - 1))
        parts = np.concatenate([low - high, high[:, -1:], np.ones((len(u), 1))], 1)
        weights = np.linalg.solve(parts.T @ parts + 1e-6 * len(u) * np.eye(STEPS + 2), parts.T @ want[:, i])
        lower[:, i, i], upper[:, i, i], bias[i] = weights[:STEPS], -weights[:STEPS], weights[-1] + ABOVE
        upper[-1, i, i] += weights[STEPS]
    steps = np.kron(RATIO ** -np.arange(STEPS)[:, None], np.eye(mels))                                # (STEPS M, M)
    filters = LEVEL * GAIN * np.concatenate([wave, -wave], 1)
    layers = [(np.reshape([TINY, -TINY], (2, 1, 1)), np.zeros(2)), (filters, np.zeros(len(filters))),
              (np.repeat(bank * scale, 3, 0).T, np.zeros(mels)),
              (np.tile(steps, (2, 1)), np.repeat([0.0, -1.0], STEPS * mels)),
              (np.concatenate([*lower, *upper]).T, bias)]
    out = {"0.layer_norm.weight": np.full(2, 1e-5**0.5 / TINY), "0.layer_norm.bias": np.zeros(2)}
    for i, (weight, shift) in enumerate(layers):
        out |= {f"{i}.conv.weight": weight.reshape(*weight.shape[:2], -1), f"{i}.conv.bias": shift}
    return out


def front(teacher: Slim, batches) -> dict[str, np.ndarray]:
    """All convolutions and the projection, whose output is Whisper's embedding and its mean position. The norm before
    the projection is told to scale nothing by a channel that is always large, and to shift nothing by one of zeros."""
    given = {k.removeprefix("model.encoder."): np.asarray(v, np.float64) for k, v in teacher.params.items()}
    out, conv1 = log_mel(teacher, batches), given["conv1.weight"]
    width, squares, sums, count = len(conv1), 0.0, 0.0, 0
    for _, batch in zip(range(8), batches, strict=False):
        states = np.asarray(hear(teacher, batch["input_values"], batch["input_values"].shape[1] // STRIDE - 2)[0][0])
        squares, sums, count = squares + (states**2).sum(), sums + states.sum(), count + states[..., 0].size
    large = 5 * (squares / count) ** 0.5
    mean = (sums / count + large) / (width + 2)
    scale = ((squares / count + large**2) / (width + 2) - mean**2 + 1e-5) ** 0.5
    out |= {"5.conv.weight": conv1, "5.conv.bias": given["conv1.bias"] - ABOVE * conv1.sum((1, 2)),
            "6.conv.weight": np.pad(given["conv2.weight"], ((0, 2), (0, 0), (0, 0))),
            "6.conv.bias": np.append(given["conv2.bias"], [large, 0.0])}
    projection = scale * np.pad(np.eye(width), ((0, 0), (0, 2)))
    projection[:, -1] = -scale
    out = {f"feature_extractor.conv_layers.{k}": v for k, v in out.items()} | {
        "feature_projection.layer_norm.weight": np.ones(width + 2),
        "feature_projection.layer_norm.bias": np.zeros(width + 2), "feature_projection.projection.weight": projection,
        "feature_projection.projection.bias": given["embed_positions.weight"].mean(0),
        "encoder.pos_conv_embed.conv.parametrizations.weight.original0": np.zeros((1, 1, KERNEL))}
    return {f"wav2vec2.{k}": v.astype(np.float32) for k, v in out.items()}


@dataclasses.dataclass(frozen=True)
class FromWhisper(Method):
    units: int = 1280           # of every feed-forward block
    state_weight: float = 1.0   # of each of them
    task_weight: float = 0.0    # of CTC, on data with texts

    def student(self, teacher: Slim, stock: Slim, batches, key) -> Slim:
        """The student, with the vocabulary of `stock`."""
        t, count = teacher.spec, teacher.spec["encoder_layers"]
        copied = front(teacher, batches)
        widths = [len(v) for k, v in copied.items() if k.endswith("conv.bias")]
        spec = stock.spec.replace(config={
            **stock.spec.config, **FRONT, "conv_dim": widths, "num_feat_extract_layers": len(widths),
            "feat_extract_norm": "group", "conv_bias": True,
            "do_stable_layer_norm": True, "hidden_size": t["d_model"], "num_hidden_layers": count,
            "num_attention_heads": t["encoder_attention_heads"], "intermediate_size": self.units,
            "num_conv_pos_embeddings": KERNEL, "layer_norm_eps": 1e-5, "mask_time_prob": 0.01, "mask_time_min_masks": 0,
            # dropout of a state whose channels have large means is mostly noise
            **dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0)})
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
        mask = jnp.arange(targets["0"].shape[1]) < out.lengths[:, None]                             # (B, T)
        states, terms = [*(out.taps[t] for t in taps), out.last_hidden_state], {}
        for i in range(count + 1):
            terms[str(i)] = losses.hidden(states[i], targets[str(i)], mask, "channel_mse")._replace(
                weight=self.state_weight)
        if self.task_weight:
            terms |= {k: t._replace(weight=self.task_weight * t.weight) for k, t in ctc(student, out, batch).items()}
        return terms

    def labelled(self) -> bool:
        return self.task_weight > 0

    def group(self, name: str) -> str:
        if re.search(roles.FRONTEND, name) or name.startswith("lm_head") and not self.task_weight:
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
                       validate=recipe.validation(cfg.data, task))
    hub.save(trained, f"{cfg.output_dir}/final", source=args.stock)


if __name__ == "__main__":
    main()
