"""w2v-BERT 2.0 (arXiv 2312.05187), `Wav2Vec2Bert...` in transformers: Conformer layers on log-mel frames, no front end,
with an adapter of strided transformer layers behind them."""
from __future__ import annotations

from flax import nnx

from jaxslim.models import adapters, heads, wav2vec2
from jaxslim.models import layers as L
from jaxslim.models.attention import attention
from jaxslim.models.conformer import Transformer, eps
from jaxslim.slim import Outputs
from jaxslim.spec import Spec


def build(spec: Spec) -> nnx.Module:
    return heads.build(spec, BertEncoder(spec))


class BertEncoder(nnx.Module):
    """`Wav2Vec2BertModel`: `input_features` (B, T, 160), `attention_mask` (B, T) of the same frames."""

    augment = wav2vec2.Encoder.augment

    def __init__(self, spec: Spec):
        self.spec, width = spec, spec["hidden_size"]
        self.feature_projection = Projection(spec)
        self.encoder = Transformer(spec, final=False)
        self.masking = spec["mask_time_prob"] > 0 or spec["mask_feature_prob"] > 0
        if self.masking:
            self.masked_spec_embed = L.param(width)
        self.expanded, self.adapted = spec["use_intermediate_ffn_before_adapter"], bool(spec["add_adapter"])
        if self.expanded:
            self.intermediate_ffn = PlainFeedForward(width, spec["intermediate_size"], "relu")
        if self.adapted:
            self.adapter = BertAdapter(spec)

    def __call__(self, call: L.Call, input_features, attention_mask=None) -> Outputs:
        x = input_features.astype(self.feature_projection.projection.weight.dtype)
        lengths = None if attention_mask is None else attention_mask.sum(-1)
        mask = None if attention_mask is None else attention_mask.astype(bool)
        x = projected = L.dropout(self.feature_projection(x), self.spec["feat_proj_dropout"], call, 1101)
        if call.key is not None and self.masking and self.spec["apply_spec_augment"]:
            x = self.augment(x, lengths, call)
        x, states, taps = self.encoder(x, mask, call)
        taps |= call.keep({"projection": projected}, mask)
        x = x + 0.5 * self.intermediate_ffn(x) if self.expanded else x
        if self.adapted:
            x, lengths = self.adapter(x, lengths, call)
        return Outputs(None, x, tuple(states) if call.hidden else None, taps or None, lengths)


class Projection(nnx.Module):
    def __init__(self, spec: Spec):
        width = spec["feature_projection_input_dim"]
        self.layer_norm = L.LayerNorm(width, spec["layer_norm_eps"])
        self.projection = L.Linear(width, spec["hidden_size"])

    def __call__(self, x):                                               # (B, T, 160) -> (B, T, D)
        return self.projection(self.layer_norm(x))


class PlainFeedForward(nnx.Module):
    """A feed-forward block that no Spec changes."""

    def __init__(self, width: int, units: int, act: str):
        self.act = L.activation(act)
        self.intermediate_dense, self.output_dense = L.Linear(width, units), L.Linear(units, width)

    def __call__(self, x):
        return self.output_dense(self.act(self.intermediate_dense(x)))


class PlainAttention(nnx.Module):
    """Softmax attention that no Spec changes."""

    def __init__(self, width: int, count: int):
        self.count = count
        self.linear_q, self.linear_k, self.linear_v, self.linear_out = (L.Linear(width, width) for _ in range(4))

    def __call__(self, x, mask, call: L.Call):
        q, k, v = (f(x).reshape(*x.shape[:2], self.count, -1) for f in (self.linear_q, self.linear_k, self.linear_v))
        return self.linear_out(attention(q, k, v, mask, q.shape[-1] ** -0.5, call).reshape(x.shape))


class BertAdapter(nnx.Module):
    """`Wav2Vec2BertAdapter`: transformer layers whose inputs are strided gated convolutions."""

    def __init__(self, spec: Spec):
        width = heads.width(spec)
        self.narrows = width != spec["hidden_size"]
        self.kernel, self.stride = spec["adapter_kernel_size"], spec["adapter_stride"]
        if self.narrows:
            self.proj, self.proj_layer_norm = L.Linear(spec["hidden_size"], width), L.LayerNorm(width, eps(spec))
        self.layers = nnx.List([BertAdapterLayer(spec, width) for _ in range(spec["num_adapter_layers"])])

    def __call__(self, x, lengths, call: L.Call):                        # (B, T, D) -> (B, T', D'), lengths
        x = self.proj_layer_norm(self.proj(x)) if self.narrows else x
        for layer in self.layers:
            if lengths is not None:
                lengths = (lengths + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1
            x = layer(x, lengths, call)
        return x, lengths


class BertAdapterLayer(nnx.Module):
    def __init__(self, spec: Spec, width: int):
        self.stride, kernel = spec["adapter_stride"], spec["adapter_kernel_size"]
        self.residual_layer_norm, self.self_attn_layer_norm, self.ffn_layer_norm = (
            L.LayerNorm(width, eps(spec)) for _ in range(3))
        self.residual_conv, self.self_attn_conv = (L.Conv(width, 2 * width, kernel) for _ in range(2))
        self.self_attn = PlainAttention(width, spec["num_attention_heads"])
        self.ffn = PlainFeedForward(width, spec["intermediate_size"], spec["adapter_act"])

    def __call__(self, x, lengths, call: L.Call):
        shorten = lambda x, conv: adapters.glu(conv(x, self.stride, self.stride // 2))  # noqa: E731
        residual = shorten(self.residual_layer_norm(x), self.residual_conv)
        h = shorten(self.self_attn_layer_norm(x), self.self_attn_conv)
        h = self.self_attn(h, L.frame_mask(lengths, h.shape[1]), call) + residual
        return self.ffn(self.ffn_layer_norm(h)) + h
