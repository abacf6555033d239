"""A slimmed Wav2Vec2: the stock model of transformers in which some sub-modules are replaced by smaller or faster ones.

Written by jaxslim from config.json, whose key `jaxslim` says for each block (`frontend.1`, `encoder.3.attention`,
`encoder.3.ffn`) what differs from the stock model. Parameters keep the stock names, so training, saving and pipelines
work as usual. Shapes in comments: B batch, T frames, H heads, K head size, F features.
"""
import torch
import torch.nn.functional as F
import transformers as stock
from torch import nn
from transformers.activations import ACT2FN  # part: adapter
from transformers.cache_utils import EncoderDecoderCache  # part: decoder
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2Attention  # part: attention

from .configuration_jaxslim import JaxslimConfig

LAYERS = {"encoder": "encoder.layers.{}"}  # side -> name of a layer, without the head
PARTS = {  # part of a layer -> role -> its name in the layer
    "attention": {"owner": "attention", "q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj",
                  "o": "attention.out_proj"},
    "ffn": {"owner": "feed_forward", "up": "feed_forward.intermediate_dense", "down": "feed_forward.output_dense"},
}
SHAPES = {"heads", "mixer", "options", "qk_dim", "scale", "v_dim"}  # part: attention
OPTIONS = {}  # mixer -> its options, where a block says nothing else  # part: attention
RECURRENT = ("mamba2", "mamba", "gated_deltanet", "gla")  # part: attention


def slim(model):
    """Replaces the sub-modules of a stock model that its config's `jaxslim` changes."""
    base, blocks = model.base_model, model.config.jaxslim["blocks"]
    base = getattr(model, "encoder", model)  # part: parakeet
    for block, fields in blocks.items():
        if block == "generator":                                                                 # part: generator
            base.encoder = GenerativeEncoder(base.config, base.encoder, fields)                  # part: generator
            base.register_forward_hook(GenerativeEncoder.show, with_kwargs=True)                 # part: generator
            continue                                                                             # part: generator
        side, number, *part = block.split(".")
        if part:
            layer, names = base.get_submodule(LAYERS[side].format(number)), PARTS[part[0]]
            if "conv" in names:                                                                  # part: conv
                slim_conv(layer, names, fields["channels"])                                      # part: conv
                continue                                                                         # part: conv
            if "q" in names and fields.keys() & SHAPES:                                          # part: attention
                make = Attention                                                                 # part: attention
                make = DecoderAttention if side == "decoder" else Attention                      # part: decoder
                old = layer.get_submodule(names["owner"])                                        # part: attention
                replace(layer, names["owner"], make(base.config, old, names, fields))            # part: attention
                continue                                                                         # part: attention
            slim_linears(layer, names, fields)
    tie(base)  # part: linformer
    slim_frontend(model.config, base, blocks)                          # part: waves
    slim_first(base.encoder, blocks["frontend.0"]["channels"])         # part: whisper
    for block, fields in blocks.items():                  # part: adapter
        if "adapter" in fields:                           # part: adapter
            add_adapter(base, block, fields["adapter"])   # part: adapter


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
            new = Bias(dout, old.bias is not None)
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
    """What is left of a linear whose inputs were all pruned away: zeros if it had no bias."""

    def __init__(self, size, learned=True):
        super().__init__()
        self.size, self.bias = size, nn.Parameter(torch.zeros(size)) if learned else None

    def forward(self, x):
        return (x.new_zeros(self.size) if self.bias is None else self.bias).expand(*x.shape[:-1], -1)


class Nothing(nn.Module):
    """A linear whose outputs were all pruned away."""

    def forward(self, x):
        return x[..., :0]


# part: adapter
class Adapter(nn.Module):
    """A bottleneck: scale up(act(down(x)))."""

    def __init__(self, size, a):
        super().__init__()
        bias = a.get("bias", True)
        self.norm = nn.LayerNorm(size) if a.get("norm") else None
        self.down, self.up = nn.Linear(size, a["width"], bias), nn.Linear(a["width"], size, bias)
        self.act, self.scale = ACT2FN[a.get("act", "relu")], a.get("scale", 1.0)

    def forward(self, x):
        x = x if self.norm is None else self.norm(x)
        return self.scale * self.up(self.act(self.down(x)))


class MergedAdapter(nn.Module):
    """What is left of an adapter that has become units of the feed-forward: the bias of its output."""

    def __init__(self, size, a):
        super().__init__()
        self.up = Bias(size) if a.get("bias", True) else None

    def forward(self, x):
        return 0 if self.up is None else self.up(x)


class TwoActivations(nn.Module):
    """One activation, and another on the last `width` units."""

    def __init__(self, act, other, width):
        super().__init__()
        self.act, self.other, self.width = act, other, width

    def forward(self, x):
        return torch.cat([self.act(x[..., :-self.width]), self.other(x[..., -self.width:])], -1)


def add_adapter(base, block, a):
    """Puts a block's adapter in: one module remembers what it reads, another adds what it gives."""
    side, number, part = block.split(".")
    layer, names = base.get_submodule(LAYERS[side].format(number)), PARTS[part]
    owner, last = layer.get_submodule(names["owner"]), layer.get_submodule(names["o" if "o" in names else "down"])
    size = next(p for p in layer.get_submodule(names["norm"]).parameters()).shape[0]
    owner.adapter = (MergedAdapter if a["kind"] == "merged" else Adapter)(size, a)
    if a["kind"] == "merged":
        holder = owner if any(hasattr(owner, name) for name in ACTIVATIONS) else layer
        name = next(name for name in ACTIVATIONS if hasattr(holder, name))
        setattr(holder, name, TwoActivations(getattr(holder, name), ACT2FN[a.get("act", "relu")], a["width"]))
    if a["kind"] == "sequential":
        last = layer if a.get("input") == "layer" else last
        last.reads = (last, owner.adapter)          # a tuple: neither becomes a part of the module
    else:
        first = layer.get_submodule(names["norm" if a.get("input") == "raw" else "up"])
        first.register_forward_pre_hook(remember)
        last.reads = (first, owner.adapter)
    last.register_forward_hook(add)


ACTIVATIONS = ("intermediate_act_fn", "activation_fn", "activation")


def remember(module, inputs):
    module.seen = inputs[0]


def add(module, inputs, out):
    first, adapter = module.reads
    y = out[0] if isinstance(out, tuple) else out
    y = y + adapter(y if first is module else first.seen)
    return (y, *out[1:]) if isinstance(out, tuple) else y


# part: attention
class Attention(Wav2Vec2Attention):
    """Attention with heads, head sizes or a mixer other than the stock one's; called and named like it."""

    def __init__(self, config, old, names, fields):
        nn.Module.__init__(self)
        total, width = getattr(old, "num_heads", config.num_attention_heads), config.hidden_size
        rates = (getattr(config, key, None) for key in ("attention_dropout", "attention_probs_dropout_prob"))
        self.config, self.dropout = config, next(rate for rate in rates if rate is not None)
        self.kept = list(fields.get("heads", range(total)))
        self.mixer, self.scale = fields.get("mixer", "softmax"), fields.get("scale", (width // total) ** -0.5)
        self.names = {role: names[role].removeprefix(names["owner"] + ".") for role in "qkvo"}
        for group in {name.partition(".")[0] for name in self.names.values() if "." in name}:  # BERT's self, output
            setattr(self, group, getattr(old, group))
        self.keep_positions(old)  # part: gated
        heads, size = len(self.kept), fields.get("qk_dim", width // total)
        self.keep_distances(old, names, heads, size)  # part: distances
        self.options = {**OPTIONS[self.mixer], **fields.get("options", {})}
        if self.kept and self.mixer in RECURRENT:                                        # part: recurrent
            self.build(width)                                                            # part: recurrent
            return                                                                       # part: recurrent
        qk, v = heads * size, heads * fields.get("v_dim", width // total)
        for role, din, dout in (("q", width, qk), ("k", width, qk), ("v", width, v), ("o", v, width)):
            bias = old.get_submodule(self.names[role]).bias is not None
            new = Bias(dout) if din == 0 else Nothing() if dout == 0 else linear(din, dout, bias, role, fields)
            replace(self, self.names[role], new)
        if "features" in self.options and self.mixer != "linformer" and self.kept:       # part: linear
            args = heads, self.options["features"], size, self.mixer == "t2r"            # part: linear
            self.feature_q, self.feature_k = Features(*args), Features(*args)            # part: linear
        if self.options.get("window") and self.kept:                                     # part: linear
            self.window_factor = nn.Parameter(torch.zeros(heads))                        # part: linear
        if self.mixer == "linformer" and self.kept:                                      # part: linformer
            for name in ("E", "F")[: 1 + (self.options["sharing"] == "none")]:           # part: linformer
                shape = self.options["length"], self.options["features"]                 # part: linformer
                setattr(self, name, nn.Parameter(torch.randn(shape)))                    # part: linformer

    def forward(self, hidden_states, attention_mask=None, position_bias=None, **kwargs):
        y, weights, bias = hidden_states[..., :0], None, None
        bias, position_bias = self.positions(hidden_states, position_bias)  # part: gated
        if self.kept and self.mixer in RECURRENT:                                        # part: recurrent
            y = recur(self, hidden_states, key_mask(attention_mask))                     # part: recurrent
        if self.kept and self.mixer not in RECURRENT:
            turned = hidden_states
            turned = self.turn(hidden_states, kwargs)  # part: distances
            q, k, v = self.split("q", turned), self.split("k", turned), self.split("v", hidden_states)
            q, bias = self.distances(q, kwargs)  # part: distances
            y, weights = self.mix(q, k, v, key_mask(attention_mask), bias)
            y = y.transpose(1, 2).flatten(2)                                             # (B, T, H K)
        name, _, inner = self.names["o"].partition(".")
        out = getattr(self, name)
        y = out(y, hidden_states) if inner else out(y)                  # BERT's `output` adds the residual itself
        return y, weights, position_bias  # part: gated
        return y, weights                 # part: plain

    def split(self, role, x):
        """x (B, T, D) through the linear of a role, by head: (B, H, T, K)."""
        return self.get_submodule(self.names[role])(x).unflatten(-1, (len(self.kept), -1)).transpose(1, 2)

    def mix(self, q, k, v, mask, bias):
        """q (B, H, T, K), k, v (B, H, S, K), mask (B, S) or (B, 1, T, S) -> (B, H, T, K), and the attention map
        if there is one."""
        if self.mixer in ("elu", "t2r", "hedgehog"):                                     # part: linear
            return linear_attention(self, q, k, v, mask), None                           # part: linear
        if self.mixer == "linformer":                                                    # part: linformer
            k, v = mixtures(self, k, v, mask)                                            # part: linformer
            mask = None                                                                  # part: linformer
        scores = (q * self.scale) @ k.transpose(-1, -2)
        scores = scores if bias is None else scores + bias
        if mask is not None:
            mask = mask[:, None, None] if mask.ndim == 2 else mask
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.float().softmax(-1).to(v.dtype)
        return F.dropout(weights, self.dropout, self.training) @ v, weights

    # part: linear
    def features(self, role, x):
        """x (B, H, T, K) queries or keys -> positive features (B, H, T, F)."""
        return F.elu(x.float()) + 1.0 if self.mixer == "elu" else getattr(self, f"feature_{role}")(x)

    # part: recurrent
    def build(self, width):
        """Projections of its own in the place of q, k, v, o."""
        for name in self.names.values():
            replace(self, name, nn.Identity())
        make = {"mamba2": Mamba2, "mamba": Mamba, "gated_deltanet": GatedDeltaNet,
                "gla": GatedLinearAttention}[self.mixer]
        make = Hydra if self.options["direction"] == "shared" else make
        for name in {"shared": ("shared",), "causal": ("fwd",)}.get(self.options["direction"], ("fwd", "bwd")):
            setattr(self, name, make(width, self.options))

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


    # part: distances
    def keep_distances(self, old, names, heads, size):
        """What the stock attention knows of positions, for the heads and sizes that are left."""
        self.num_heads, self.head_size = self.config.num_attention_heads, getattr(old, "head_size", None)
        self.positions, self.extra = None, ()
        if not self.kept or self.mixer != "softmax":
            return
        self.positions = getattr(self.config, "position_embeddings_type", "relative")  # Parakeet's has no other
        if self.positions == "relative":
            self.extra = [names[role].rpartition(".")[2] for role in ("pos", "bias_u", "bias_v")]
            setattr(self, self.extra[0], nn.Linear(self.config.hidden_size, heads * size, bias=False))
            for name in self.extra[1:]:
                setattr(self, name, nn.Parameter(torch.zeros(heads, size)))
        if self.positions == "relative_key":
            self.distance_embedding = nn.Embedding(old.distance_embedding.num_embeddings, size)

    def turn(self, x, shared):
        """What the projections of queries and keys read: with rotary positions x turned, head by head."""
        if self.positions != "rotary":
            return x
        return self._apply_rotary_embedding(x, shared["relative_position_embeddings"])

    def distances(self, q, shared):
        """Queries (B, H, T, K) as the content scores see them, and what is added to the scores (B, H, T, T)."""
        length = q.shape[2]
        if self.positions == "relative":
            pos, u, v = (getattr(self, name) for name in self.extra)
            place = shared.get("relative_position_embeddings", shared.get("position_embeddings"))
            keys = pos(place).unflatten(-1, (len(self.kept), -1)).permute(0, 2, 3, 1)    # (B, H, K, 2T - 1)
            scores = F.pad(((q + v[:, None]) * self.scale) @ keys, (1, 0))
            scores = scores.view(*scores.shape[:2], -1, length)[:, :, 1:].reshape(*q.shape[:3], 2 * length - 1)
            return q + u[:, None], scores[..., :length]
        if self.positions == "relative_key":
            steps, left = torch.arange(length, device=q.device), self.config.left_max_position_embeddings
            index = (steps - steps[:, None]).clamp(-left, self.config.right_max_position_embeddings) + left
            return q, torch.einsum("bhtk,tsk->bhts", q * self.scale, self.distance_embedding(index).to(q.dtype))
        return q, None


# part: decoder
class DecoderAttention(Attention):
    """The same in a decoder: it looks at what came before, kept in a cache, or at the encoder's output."""

    def __init__(self, config, old, names, fields):
        super().__init__(config, old, names, fields)
        self.layer_idx = old.layer_idx

    def forward(self, hidden_states, key_value_states=None, past_key_values=None, attention_mask=None, **kwargs):
        cross, cache, known = key_value_states is not None, past_key_values, False
        if isinstance(cache, EncoderDecoderCache):
            known = cross and cache.is_updated.get(self.layer_idx)
            if cross:
                cache.is_updated[self.layer_idx] = True
            cache = cache.cross_attention_cache if cross else cache.self_attention_cache
        if known:
            k, v = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            x = key_value_states if cross else hidden_states
            k = v = x[:, None, :, :1]  # of a block without heads: the cache counts frames with it
            if self.kept:
                k, v = self.split("k", x), self.split("v", x)
            if cache is not None:
                k, v = cache.update(k, v, self.layer_idx)
        y, weights = hidden_states[..., :0], None
        if self.kept:
            mask = None if cross else causal_mask(attention_mask, hidden_states.shape[1], k)
            y, weights = self.mix(self.split("q", hidden_states), k, v, mask, None)
            y = y.transpose(1, 2).flatten(2)
        return self.get_submodule(self.names["o"])(y), weights


def causal_mask(mask, length, keys):
    """(.., T, S) bool, True = seen; of none, each of the last `length` places sees itself and what is before it."""
    total = keys.shape[2]
    if mask is None:
        return torch.ones(1, 1, length, total, dtype=torch.bool, device=keys.device).tril(total - length)
    return mask[..., :total] if mask.dtype == torch.bool else mask[..., :total] == 0


# part: attention
def key_mask(mask):
    """(B, T) bool, True = a valid frame, of the masks that stock encoders make; None = all are valid."""
    if mask is None:
        return None
    mask = mask[:, 0, 0] if mask.ndim == 4 else mask    # (B, 1, T, T): bool, or 0 and a large negative number
    return mask if mask.dtype == torch.bool else mask == 0 if mask.is_floating_point() else mask == 1


# part: generated
# part: mixers
# part: conv
def slim_conv(layer, names, channels):
    """A Conformer's convolution module with fewer channels, or none."""
    if channels == 0:
        return replace(layer, names["owner"], NoConvolution(layer, names))
    up, conv, inner, down = (layer.get_submodule(names[role]) for role in ("up", "conv", "inner", "down"))
    replace(layer, names["up"], nn.Conv1d(up.in_channels, 2 * channels, 1, bias=up.bias is not None))
    replace(layer, names["conv"], nn.Conv1d(channels, channels, conv.kernel_size, padding=conv.padding, groups=channels,
                                            bias=conv.bias is not None))
    replace(layer, names["inner"], type(inner)(channels, eps=inner.eps))
    replace(layer, names["down"], nn.Conv1d(channels, down.out_channels, 1, bias=down.bias is not None))


class NoConvolution(nn.Module):
    """A convolution module whose channels were all pruned away: its output bias, if it had one."""

    def __init__(self, layer, names):
        super().__init__()
        old, down = layer.get_submodule(names["owner"]), layer.get_submodule(names["down"])
        if hasattr(old, "layer_norm"):
            self.layer_norm = old.layer_norm    # read by nothing any more, but in the checkpoint
        self.last = names["down"].removeprefix(names["owner"] + ".") if down.bias is not None else None
        if self.last:
            setattr(self, self.last, Bias(down.out_channels))

    def forward(self, x, *args, **kwargs):
        return getattr(self, self.last)(x) if self.last else torch.zeros_like(x)


# part: whisper
def slim_first(encoder, channels):
    """A first convolution with fewer channels, and the second one that reads them."""
    first, second = encoder.conv1, encoder.conv2
    encoder.conv1 = nn.Conv1d(first.in_channels, channels, first.kernel_size, first.stride, first.padding)
    encoder.conv2 = nn.Conv1d(channels, second.out_channels, second.kernel_size, second.stride, second.padding)


# part: waves
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
