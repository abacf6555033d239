"""Small random models of every family against PyTorch transformers, every switch drawn by chance, all weights random.

    python scripts/parity_random.py                       # 12 configs a family -> docs/results/parity_random.json
    python scripts/parity_random.py whisper --configs 3

A row's `largest` is the worst of max difference / max(1, max abs of the reference) over the logits (or last states) and
all hidden states of a padded batch in fp32; at most 1e-4 passes. The first config of a family also compares the
gradients of a scalar loss with respect to every parameter, relative to that parameter's largest; 1e-3 passes.
"""
import argparse
import contextlib
import json
import os
import pathlib
import platform
import sys
import tempfile

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from jaxslim import __version__, hub  # noqa: E402
from jaxslim.export import example  # noqa: E402
from jaxslim.models import layers  # noqa: E402

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "docs" / "results" / "parity_random.json"
NO_NOISE = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout",
                          "final_dropout", "layerdrop", "conformer_conv_dropout"), 0.0)
FLAG = (False, True)
SIZES = dict(hidden_size=(32, 48), num_hidden_layers=(1, 2, 3), num_attention_heads=(2, 4), intermediate_size=(24, 40),
             vocab_size=(11, 30), hidden_act=("gelu", "relu", "silu", "gelu_new"), layer_norm_eps=(1e-5, 1e-3),
             mask_time_prob=(0.0, 0.05))
FRONT = dict(conv_dim=([12, 16, 20], [8, 8, 8]), conv_kernel=([10, 3, 2], [8, 4, 3]),
             conv_stride=([5, 4, 2], [5, 3, 2]), conv_bias=FLAG, feat_extract_norm=("group", "layer"),
             feat_extract_activation=("gelu", "relu"),
             num_conv_pos_embeddings=(16, 15, 6), num_conv_pos_embedding_groups=(4, 8))
HEAD = dict(use_weighted_layer_sum=FLAG, classifier_proj_size=(10,), num_labels=(2, 5), tdnn_dim=([8, 6, 10],),
            tdnn_kernel=([3, 2, 1],), tdnn_dilation=([1, 2, 1],), xvector_output_dim=(7,))
ADAPTER = dict(add_adapter=FLAG, num_adapter_layers=(1, 2), adapter_stride=(2, 3), adapter_kernel_size=(3, 4),
               output_hidden_size=(None, 24))
SPEECH = {**SIZES, **FRONT, **HEAD}
POSITIONS = dict(hidden_act=("swish", "gelu"), conv_depthwise_kernel_size=(3, 5, 7))
TEXT = dict(vocab_size=(40, 60), hidden_size=(32, 48), num_hidden_layers=(1, 2, 3), num_attention_heads=(2, 4),
            intermediate_size=(24, 40), max_position_embeddings=(40, 64), hidden_act=("gelu", "relu"),
            num_labels=(2, 3), layer_norm_eps=(1e-12, 1e-5), type_vocab_size=(1, 2), classifier_dropout=(None, 0.1))
ALL, BASIC = ("none", "ctc", "classification", "frames", "xvector"), ("none", "ctc", "classification")
SWITCHES = {  # family: (heads, switch -> its values)
    "wav2vec2": (ALL, {**SPEECH, **ADAPTER, "do_stable_layer_norm": FLAG, "adapter_attn_dim": (None, 6)}),
    "hubert": (BASIC, {**SPEECH, "do_stable_layer_norm": FLAG, "feat_proj_layer_norm": FLAG,
                       "conv_pos_batch_norm": FLAG, "adapter_attn_dim": (None, 6)}),
    "wavlm": (ALL, {**SPEECH, **ADAPTER, "do_stable_layer_norm": FLAG, "num_buckets": (20, 320),
                    "max_bucket_distance": (30, 800)}),
    "wav2vec2-conformer": (ALL, {**SPEECH, **ADAPTER, **POSITIONS,
                                 "position_embeddings_type": ("relative", "rotary", None)}),
    "wav2vec2-bert": (ALL, {**SIZES, **HEAD, **ADAPTER, **POSITIONS, "feature_projection_input_dim": (20, 32),
                            "position_embeddings_type": ("relative_key", "relative", "rotary", None),
                            "left_max_position_embeddings": (6, 64), "right_max_position_embeddings": (3, 8),
                            "use_intermediate_ffn_before_adapter": FLAG, "adapter_act": ("relu", "gelu")}),
    "parakeet_ctc": (("ctc",), {}),
    "parakeet_encoder": (("none",), {}),
    "whisper": (("seq2seq", "none"), dict(
        vocab_size=(50,), d_model=(32, 48), encoder_layers=(1, 2, 3), decoder_layers=(1, 2), num_mel_bins=(80, 128),
        encoder_attention_heads=(2, 4), decoder_attention_heads=(2, 4), encoder_ffn_dim=(24, 40), pad_token_id=(1,),
        decoder_ffn_dim=(24, 40), max_source_positions=(20, 40), max_target_positions=(12, 20),
        activation_function=("gelu", "relu"), tie_word_embeddings=FLAG, scale_embedding=(False,),
        decoder_start_token_id=(4,), suppress_tokens=(None,), begin_suppress_tokens=(None,))),
    "bert": (("none", "classification"), TEXT),
    "roberta": (("none", "classification"), TEXT),
    "distilbert": (("none", "classification"), dict(
        vocab_size=(40, 60), dim=(32, 48), n_layers=(1, 2), n_heads=(2, 4), hidden_dim=(24, 40), num_labels=(2, 3),
        max_position_embeddings=(40, 64), activation=("gelu", "relu"), sinusoidal_pos_embds=FLAG)),
    "gpt_neox": (("causal", "none"), dict(
        vocab_size=(40, 60), hidden_size=(32, 48), num_hidden_layers=(1, 2, 3), num_attention_heads=(2, 4),
        intermediate_size=(24, 40), hidden_act=("gelu", "relu"), use_parallel_residual=FLAG, attention_bias=FLAG,
        tie_word_embeddings=FLAG, rope_parameters=tuple(
            dict(rope_type="default", rope_theta=base, partial_rotary_factor=share)
            for base in (100.0, 10000.0) for share in (0.25, 0.5, 1.0)))),
}
PARAKEET = dict(hidden_size=(32, 48), num_hidden_layers=(1, 2, 3), num_attention_heads=(2, 4),
                intermediate_size=(24, 40), hidden_act=("silu", "relu"), attention_bias=FLAG, convolution_bias=FLAG,
                conv_kernel_size=(5, 9),
                subsampling_factor=(4, 8), subsampling_conv_channels=(6, 8), num_mel_bins=(80, 128), scale_input=FLAG)


def draw(family: str, seed: int) -> tuple[str, dict]:
    """(head, what differs from the family's defaults); the head in turn, switches by chance."""
    rng = np.random.default_rng([seed, sum(family.encode())])
    heads, switches = SWITCHES[family]
    pick = lambda table: {k: v[rng.integers(len(v))] for k, v in table.items()}  # noqa: E731
    head, changes = heads[seed % len(heads)], pick(switches)
    if head in ("classification", "frames"):
        changes.pop("add_adapter", None)              # does not go together, in transformers neither
    if head == "xvector":
        changes.pop("output_hidden_size", None)       # its projector reads the layers' width there
    if not changes.get("add_adapter"):
        changes.pop("use_intermediate_ffn_before_adapter", None)  # transformers has it with an adapter only
    if not family.startswith("parakeet"):
        return head, changes
    encoder = {**pick(PARAKEET), "dropout": 0.0, "dropout_positions": 0.0}
    return head, {"encoder_config": encoder, "vocab_size": 11, "pad_token_id": 0} if head == "ctc" else encoder


def random_model(family: str, head: str, changes: dict, seed: int):
    """A transformers model whose parameters and stored statistics are all random: norms near 1, biases near 0."""
    config = transformers.CONFIG_MAPPING[family](**{**(NO_NOISE if "hidden_size" in changes else {}), **changes})
    model = getattr(transformers, hub._architecture(family, head))(config).eval()
    generator, stored = torch.Generator().manual_seed(seed), set(model.state_dict())
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if not p.is_floating_point() or name not in stored:
                continue
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith(("running_var", "original0")):
                p.copy_(0.5 + noise.abs())
            else:
                norm = 1.0 if name.endswith("orm.weight") else 0.0
                p.copy_(0.3 * noise + norm if p.ndim == 1 else 1.2 * noise / p[0].numel() ** 0.5)
    return model


def every(out, last) -> list:
    """Logits (or last states) and all hidden states, the encoder's before the decoder's."""
    states = getattr(out, "hidden_states", None) or getattr(out, "decoder_hidden_states", None)
    return [*(getattr(out, "encoder_hidden_states", None) or ()), *states, last]


def score(log_softmax, logits, valid):
    """The loss whose gradients are compared."""
    return (valid * log_softmax(logits, -1)[..., 1] ** 2).mean()


def measure(family: str, seed: int) -> dict:
    head, changes = draw(family, seed)
    model = random_model(family, head, changes, seed)
    with tempfile.TemporaryDirectory() as tmp:
        with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):  # its progress bar
            model.save_pretrained(tmp)
        ours = hub.load(tmp)
    x = example(ours.spec)
    if "input_values" in x:
        x = {k: v[:, :4000] for k, v in x.items()}
        x["attention_mask"] = (np.arange(4000) < [[4000], [2300]]).astype(np.int32)
    theirs = {k: torch.from_numpy(v.astype(np.int64) if v.dtype == np.int32 else v) for k, v in x.items()}
    with torch.no_grad():
        out = model(**theirs, output_hidden_states=True)
    want = every(out, out.logits if head != "none" else out.last_hidden_state)
    out = ours(**x, output_hidden_states=True)
    have = every(out, out.logits if head != "none" else out.last_hidden_state)
    valid = None
    if "parakeet" in family:  # padded queries attend to all frames there, to valid ones here
        valid = np.asarray(layers.frame_mask(out.lengths, out.last_hidden_state.shape[1]))
    ratios = []
    for a, b in zip(have, want, strict=True):
        a, b = np.asarray(a), b.numpy()
        a, b = (a, b) if valid is None else (a[valid], b[valid])
        ratios.append(float(np.abs(a - b).max() / max(1.0, np.abs(b).max())))
    row = {"family": family, "head": head, "seed": seed, "changes": changes, "outputs": len(ratios),
           "largest": max(ratios), "tolerance": 1e-4, "ok": max(ratios) <= 1e-4}
    if seed == 0:
        row["gradients"] = gradients(model, theirs, ours, x, head, valid)
        row["ok"] &= row["gradients"]["largest"] <= 1e-3
    return row


def gradients(model, theirs, ours, x, head: str, valid) -> dict:
    """Largest difference of a parameter's gradient, relative to that gradient's largest entry (or to 1e-2 of the
    largest of all: some are 0 but for rounding, such as those of the keys' biases)."""
    valid = np.float32(1) if valid is None else valid.astype(np.float32)
    value = lambda out: out.logits if head != "none" else out.last_hidden_state  # noqa: E731
    grads = jax.grad(lambda p: score(jax.nn.log_softmax, value(ours.replace(params=p)(**x)), valid),
                     allow_int=True)(ours.params)
    score(torch.log_softmax, value(model(**theirs)), torch.from_numpy(np.asarray(valid))).backward()
    want = {k: p.grad.numpy() for k, p in model.named_parameters() if p.grad is not None and k in grads}
    top = max(np.abs(g).max() for g in want.values())
    ratios = {k: float(np.abs(np.asarray(grads[k]) - g).max() / max(np.abs(g).max(), 1e-2 * top))
              for k, g in want.items()}
    worst = max(ratios, key=ratios.get)
    floats = sum(jnp.issubdtype(v.dtype, jnp.floating) for v in ours.params.values())
    return {"largest": ratios[worst], "at": worst, "compared": len(want), "parameters": int(floats), "tolerance": 1e-3}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(SWITCHES), metavar="FAMILY", help=", ".join(SWITCHES))
    parser.add_argument("--configs", type=int, default=12, help="of each family (default 12)")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    if unknown := set(args.families) - set(SWITCHES):
        parser.error(f"unknown family {', '.join(unknown)}; known are {', '.join(SWITCHES)}")
    versions = {"jaxslim": __version__, "python": platform.python_version(), "jax": jax.__version__,
                "torch": torch.__version__, "transformers": transformers.__version__}
    rows = json.loads(args.output.read_text()) if args.output.exists() else []
    failed = 0
    for family in args.families:
        for seed in range(args.configs):
            row = measure(family, seed) | {"device": f"cpu ({platform.machine()})", "versions": versions,
                                           "command": f"python scripts/parity_random.py {family}"}
            grads = f", gradients {row['gradients']['largest']:.1e}" if "gradients" in row else ""
            print(f"{family:20} {seed:2} {row['head']:14} largest {row['largest']:.1e}{grads}  "
                  f"{'ok' if row['ok'] else 'FAILED ' + json.dumps(row['changes'])}", flush=True)
            failed += not row["ok"]
            rows = [r for r in rows if (r["family"], r["seed"]) != (family, seed)] + [row]
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
