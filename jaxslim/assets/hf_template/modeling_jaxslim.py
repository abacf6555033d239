"""A slimmed Wav2Vec2: the stock model of transformers in which some sub-modules are replaced by smaller or faster ones.

Written by jaxslim from config.json, whose key `jaxslim` says for each block (`frontend.1`, `encoder.3.attention`,
`encoder.3.ffn`) what differs from the stock model. Parameters keep the stock names, so training, saving and pipelines
work as usual. Shapes in comments: B batch, T frames, H heads, K head size, F features.
"""
import torch
import torch.nn.functional as F
import transformers as stock
from torch import nn
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2Attention  # part: attention

from .configuration_jaxslim import JaxslimConfig

LAYERS = {"encoder": "encoder.layers.{}"}  # side -> name of a layer in the model without its head
PARTS = {  # part of a layer -> role -> its name in the layer
    "attention": {"owner": "attention", "q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj",
                  "o": "attention.out_proj"},
    "ffn": {"owner": "feed_forward", "up": "feed_forward.intermediate_dense", "down": "feed_forward.output_dense"},
}
SHAPES = {"heads", "mixer", "options", "qk_dim", "scale", "v_dim"}  # part: attention


def slim(model):
    """Replaces the sub-modules of a stock model that its config's `jaxslim` changes."""
    base, blocks = model.base_model, model.config.jaxslim["blocks"]
    for block, fields in blocks.items():
        side, number, *part = block.split(".")
        if part:
            layer, names = base.get_submodule(LAYERS[side].format(number)), PARTS[part[0]]
            if "q" in names and fields.keys() & SHAPES:                                          # part: attention
                old = layer.get_submodule(names["owner"])                                       # part: attention
                replace(layer, names["owner"], Attention(model.config, old, names, fields))     # part: attention
                continue                                                                        # part: attention
            slim_linears(layer, names, fields)
    slim_frontend(model.config, base, blocks)  # part: frontend


def slim_linears(layer, names, fields):
    """Linears as products of factors or with LoRA; a feed-forward with fewer units, or none."""
    for role in ("q", "k", "v", "o", "up", "down"):
        if role not in names:
            continue
        old = layer.get_submodule(names[role])
        din, dout = old.in_features, old.out_features
        dout = fields.get("units", dout) if role == "up" else dout
        din = fields.get("units", din) if role == "down" else din
        if din == 0:
            new = Bias(dout)
        elif dout == 0:
            new = Nothing()
        else:
            new = linear(din, dout, old.bias is not None, role, fields)
        replace(layer, names[role], new)


def replace(module, name, new):
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, new)


def linear(din, dout, bias, role, fields):
    """nn.Linear, or ours where the block's `fields` ask for a rank or LoRA."""
    rank, lora = fields.get(f"{role}_rank"), fields.get("lora", {}).get(role)
    return nn.Linear(din, dout, bias) if rank is None and lora is None else Linear(din, dout, bias, rank, lora)


class Linear(nn.Module):
    """y = x W^T + b. With a rank W is up down; LoRA adds alpha / rank B A."""

    def __init__(self, din, dout, bias, rank=None, lora=None):
        super().__init__()
        if rank is None:
            self.weight = nn.Parameter(torch.randn(dout, din) * din**-0.5)
        else:
            self.down, self.up = nn.Linear(din, rank, bias=False), nn.Linear(rank, dout, bias=False)
        self.bias = nn.Parameter(torch.zeros(dout)) if bias else None
        self.in_features, self.out_features, self.factored, self.lora = din, dout, rank is not None, lora
        if lora:
            self.lora_A = nn.Linear(din, lora["rank"], bias=False)
            self.lora_B = nn.Linear(lora["rank"], dout, bias=False)

    def forward(self, x):
        y = self.up(self.down(x)) if self.factored else F.linear(x, self.weight)
        if self.lora:
            y = y + self.lora["alpha"] / self.lora["rank"] * self.lora_B(self.lora_A(x))
        return y if self.bias is None else y + self.bias


class Bias(nn.Module):
    """What is left of a linear whose inputs were all pruned away."""

    def __init__(self, size):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return self.bias.expand(*x.shape[:-1], -1)


class Nothing(nn.Module):
    """A linear whose outputs were all pruned away."""

    def forward(self, x):
        return x[..., :0]


# part: attention
class Attention(Wav2Vec2Attention):
    """Attention with heads, head sizes or a mixer other than the stock one's; called and named like it."""

    def __init__(self, config, old, names, fields):
        nn.Module.__init__(self)
        total, width = config.num_attention_heads, config.hidden_size
        rates = (getattr(config, key, None) for key in ("attention_dropout", "attention_probs_dropout_prob"))
        self.config, self.dropout = config, next(rate for rate in rates if rate is not None)
        self.kept = list(fields.get("heads", range(total)))
        self.mixer, self.scale = fields.get("mixer", "softmax"), fields.get("scale", (width // total) ** -0.5)
        self.names = {role: names[role].removeprefix(names["owner"] + ".") for role in "qkvo"}
        for group in {name.partition(".")[0] for name in self.names.values() if "." in name}:  # BERT's self, output
            setattr(self, group, getattr(old, group))
        self.keep_positions(old)  # part: gated
        heads, size = len(self.kept), fields.get("qk_dim", width // total)
        qk, v = heads * size, heads * fields.get("v_dim", width // total)
        for role, din, dout in (("q", width, qk), ("k", width, qk), ("v", width, v), ("o", v, width)):
            bias = old.get_submodule(self.names[role]).bias is not None
            new = Bias(dout) if din == 0 else Nothing() if dout == 0 else linear(din, dout, bias, role, fields)
            replace(self, self.names[role], new)
        if self.mixer == "hedgehog" and self.kept:
            features = fields.get("options", {}).get("features", 64)
            self.feature_q, self.feature_k = Features(heads, features, size), Features(heads, features, size)

    def forward(self, hidden_states, attention_mask=None, position_bias=None, **kwargs):
        y, weights, bias = hidden_states[..., :0], None, None
        bias, position_bias = self.positions(hidden_states, position_bias)  # part: gated
        if self.kept:
            q, k, v = (self.get_submodule(self.names[role])(hidden_states).unflatten(-1, (len(self.kept), -1))
                       .transpose(1, 2) for role in "qkv")                               # (B, H, T, K)
            y, weights = self.mix(q, k, v, key_mask(attention_mask), bias)
            y = y.transpose(1, 2).flatten(2)                                             # (B, T, H K)
        name, _, inner = self.names["o"].partition(".")
        out = getattr(self, name)
        y = out(y, hidden_states) if inner else out(y)                  # BERT's `output` adds the residual itself
        return y, weights, position_bias  # part: gated
        return y, weights                 # part: plain

    def mix(self, q, k, v, mask, bias):
        """q, k, v (B, H, T, K), mask (B, T) -> (B, H, T, K), and the attention map if there is one."""
        if self.mixer == "hedgehog":
            return linear_attention(self.feature_q(q), self.feature_k(k), v, mask), None
        if self.mixer != "softmax":
            raise ValueError(f"config.json: unknown mixer {self.mixer!r}.")
        scores = (q * self.scale) @ k.transpose(-1, -2)
        scores = scores if bias is None else scores + bias
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
        weights = scores.float().softmax(-1).to(v.dtype)
        return F.dropout(weights, self.dropout, self.training) @ v, weights

    # part: gated
    def keep_positions(self, old):
        """WavLM: the position bias of all layers in the first one, and each layer's gate, for the original heads."""
        self.num_buckets, self.max_distance, self.num_heads = old.num_buckets, old.max_distance, old.num_heads
        if hasattr(old, "rel_attn_embed"):
            self.rel_attn_embed = old.rel_attn_embed
        if self.kept and self.mixer == "softmax":
            self.gru_rel_pos_const, self.gru_rel_pos_linear = old.gru_rel_pos_const, old.gru_rel_pos_linear

    def positions(self, x, shared):
        """What is added to the scores (B, H, T, T), and the bias for the layers after this one (B heads, T, T)."""
        if shared is None:
            shared = self.compute_bias(x.shape[1], x.shape[1]).repeat(x.shape[0], 1, 1)
        if not self.kept or self.mixer != "softmax":
            return None, shared
        h = self.gru_rel_pos_linear(x.unflatten(-1, (self.num_heads, -1))[:, :, self.kept])          # (B, T, H, 8)
        a, b = h.unflatten(-1, (2, 4)).sum(-1).sigmoid().unbind(-1)                                  # (B, T, H)
        gate = a * (b * self.gru_rel_pos_const.flatten()[self.kept] - 1.0) + 2.0
        return gate.transpose(1, 2)[..., None] * shared.unflatten(0, (-1, self.num_heads))[:, self.kept], shared


# part: attention
def key_mask(mask):
    """(B, T) bool, True = a valid frame, of the masks that stock encoders make; None = all are valid."""
    if mask is None:
        return None
    mask = mask[:, 0, 0] if mask.ndim == 4 else mask    # (B, 1, T, T): bool, or 0 and a large negative number
    return mask if mask.dtype == torch.bool else mask == 0 if mask.is_floating_point() else mask == 1


class Features(nn.Module):
    """Positive features of Hedgehog: phi(x) = [softmax(W x), softmax(-W x)] for each head."""

    def __init__(self, heads, features, size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, features, size) * size**-0.5)

    def forward(self, x):                                                                # (B, H, T, K)
        h = torch.einsum("bhtk,hfk->bhtf", x, self.weight).float()
        return torch.cat([h.softmax(-1), (-h).softmax(-1)], -1)                          # (B, H, T, 2F)


def linear_attention(q, k, v, mask):
    """y_t = q_t sum_s k_s v_s^T / q_t sum_s k_s over the valid frames s: linear in T."""
    if mask is not None:
        k = k * mask[:, None, :, None]
    y = q @ (k.transpose(-1, -2) @ v.float())                                            # (B, H, T, K)
    return (y / (q @ k.sum(2).unsqueeze(-1)).clamp_min(1e-9)).to(v.dtype)


# part: frontend
def slim_frontend(config, base, blocks):
    """Convolutions with fewer channels, their norms, and the projection that reads the last one."""
    channels = [1, *(blocks.get(f"frontend.{i}", {}).get("channels", n) for i, n in enumerate(config.conv_dim))]
    for layer, din, dout in zip(base.feature_extractor.conv_layers, channels, channels[1:]):
        old, norm = layer.conv, getattr(layer, "layer_norm", None)
        layer.conv = nn.Conv1d(din, dout, old.kernel_size, old.stride, bias=old.bias is not None)
        if isinstance(norm, nn.GroupNorm):
            layer.layer_norm = nn.GroupNorm(dout, dout, norm.eps)
        elif norm is not None:
            layer.layer_norm = nn.LayerNorm(dout, norm.eps)
    after = base.feature_projection
    if isinstance(getattr(after, "layer_norm", None), nn.LayerNorm):
        after.layer_norm = nn.LayerNorm(channels[-1], after.layer_norm.eps)
    after.projection = nn.Linear(channels[-1], after.projection.out_features)


# part: classes
class Wav2Vec2ForCTC(stock.Wav2Vec2ForCTC):
    config_class = JaxslimConfig

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        slim(self)
