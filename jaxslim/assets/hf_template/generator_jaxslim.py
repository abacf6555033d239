# part: generator
from transformers.modeling_outputs import BaseModelOutput  # noqa: E402
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeedForward  # noqa: E402


class GenerativeEncoder(nn.Module):
    """The few stock layers give F; the generator makes the teacher's hidden layers from it, one after another. Hidden
    states are the embedding, the stock layers' and the generated ones; the last of them is the output."""

    def __init__(self, config, old, fields):
        super().__init__()
        self.config, self.pre, self.states = config, config.do_stable_layer_norm, ()
        self.pos_conv_embed, self.layer_norm, self.dropout = old.pos_conv_embed, old.layer_norm, old.dropout
        self.layers, self.generator = old.layers, Generator(config, fields)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        valid = None if attention_mask is None else attention_mask.bool()                # (B, T)
        x = hidden_states if valid is None else hidden_states.masked_fill(~valid[..., None], 0.0)
        x = x + self.pos_conv_embed(x)
        x = self.dropout(x if self.pre else self.layer_norm(x))
        states = [x, *self.stock_layers(x, valid)]
        states += self.generator(states[-1], valid)
        self.states = tuple(states)
        return BaseModelOutput(last_hidden_state=self.layer_norm(states[-1]) if self.pre else states[-1])

    def stock_layers(self, x, valid):
        states, mask = [], None
        if valid is not None:  # part: front_plain
            mask = x.new_zeros(valid.shape).masked_fill(~valid, torch.finfo(x.dtype).min)  # part: front_plain
            mask = mask[:, None, None].expand(-1, 1, x.shape[1], -1)  # part: front_plain
        for layer in self.layers:  # part: front_plain
            x = layer(x, attention_mask=mask)  # part: front_plain
            states.append(x)  # part: front_plain
        for i, layer in enumerate(self.layers):  # part: front_wavlm
            x, mask = layer(x, attention_mask=valid, position_bias=mask, index=i)[:2]  # part: front_wavlm
            states.append(x)  # part: front_wavlm
        return states

    @staticmethod
    def show(model, args, kwargs, out):
        """Hook of the model: `hidden_states` where they are asked for."""
        wanted = kwargs.get("output_hidden_states")
        if model.config.output_hidden_states if wanted is None else wanted:
            out["hidden_states"] = model.encoder.states


class Generator(nn.Module):
    def __init__(self, config, g):
        super().__init__()
        width = config.hidden_size
        self.form, self.skip, self.by = g["attention"], g.get("skip", True), g.get("inject", "add")
        self.count = g.get("steps") or len(g["targets"])
        self.layers = nn.ModuleList([RowLayer(config, self.form) for _ in range(g.get("layers", 1))])
        self.output = nn.Linear(width, width)
        if self.form == "previous" and self.by == "concat":
            self.inject = nn.Linear(2 * width, width)
        self.layer_embedding = nn.Embedding(len(g["targets"]), width) if g.get("embedding") else None

    def forward(self, x, valid):                                                         # (B, T, D) -> K of (B, T, D)
        before, out, past = x, [], [{} for _ in self.layers]
        for row in range(self.count):
            h = before
            if self.form == "previous" and self.by == "add" and row:
                h = x + before
            if self.form == "previous" and self.by == "concat":
                h = self.inject(torch.cat([x, before if row else torch.zeros_like(x)], -1))
            if self.layer_embedding is not None:
                h = h + self.layer_embedding.weight[row]
            for layer, seen in zip(self.layers, past):
                h = layer(h, valid, seen)
            before = self.output(h) + before if self.skip else self.output(h)
            out.append(before)
        return out


class RowLayer(nn.Module):
    """A transformer layer for one generated layer; `seen` keeps keys and values of the rows before it."""

    def __init__(self, config, form):
        super().__init__()
        self.form, self.pre, self.dropout = form, config.do_stable_layer_norm, nn.Dropout(config.hidden_dropout)
        norm = lambda: nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # noqa: E731
        self.attention, self.feed_forward = RowAttention(config), Wav2Vec2FeedForward(config)
        self.layer_norm, self.final_layer_norm = norm(), norm()
        if form == "axial":
            self.across, self.across_layer_norm = RowAttention(config), norm()

    def forward(self, x, valid, seen):
        if self.form == "axial":
            x = x + self.dropout(self.across.rows(self.across_layer_norm(x), seen))
        y = self.attention(self.layer_norm(x) if self.pre else x, valid, seen if self.form == "full" else {})
        x = x + self.dropout(y)
        x = x if self.pre else self.layer_norm(x)
        x = x + self.feed_forward(self.final_layer_norm(x) if self.pre else x)
        return x if self.pre else self.final_layer_norm(x)


class RowAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, self.heads, self.rate = config.hidden_size, config.num_attention_heads, config.attention_dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def split(self, x):
        return (linear(x).unflatten(-1, (self.heads, -1)) for linear in (self.q_proj, self.k_proj, self.v_proj))

    def forward(self, x, valid, seen):
        """Over the frames of this row and of those in `seen`: (B, T, D)."""
        q, k, v = (y.transpose(1, 2) for y in self.split(x))                             # (B, H, T, K)
        seen["k"], seen["v"] = [*seen.get("k", ()), k], [*seen.get("v", ()), v]
        mask = None if valid is None else torch.cat([valid] * len(seen["k"]), 1)[:, None, None]
        y = F.scaled_dot_product_attention(q, torch.cat(seen["k"], 2), torch.cat(seen["v"], 2), mask,
                                           self.rate if self.training else 0.0)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def rows(self, x, seen):
        """Over the rows up to this one, frame by frame: (B, T, D)."""
        q, k, v = self.split(x)                                                          # (B, T, H, K)
        seen["k"], seen["v"] = [*seen.get("k", ()), k], [*seen.get("v", ()), v]
        keys, values = (torch.stack(seen[name], 3) for name in "kv")                     # (B, T, H, R, K)
        y = F.scaled_dot_product_attention(q[..., None, :], keys, values, None, self.rate if self.training else 0.0)
        return self.out_proj(y.flatten(2))


