# part: linear
def linear_attention(block, q, k, v, mask):
    """y_t = q_t sum_s k_s v_s^T / q_t sum_s k_s over the valid frames s (of causal ones, s <= t), q and k positive
    features. With a window, a share of it, learnt for each head, is softmax attention among near frames."""
    fq, fk = block.features("q", q), block.features("k", k)
    if mask is not None:
        fk = fk * mask[:, None, :, None]
    v1 = torch.cat([v.float(), torch.ones_like(v[..., :1], dtype=torch.float)], -1)      # the denominator: weights of 1
    y = causal_sum(fq, fk, v1) if block.options["causal"] else fq @ (fk.transpose(-1, -2) @ v1)
    y = y[..., :-1] / y[..., -1:].clamp_min(1e-9)
    if block.options["window"]:
        share = block.window_factor.float().sigmoid()[:, None, None]
        y = share * near(block, q, k, v, mask) + (1.0 - share) * y
    return y.to(v.dtype)


def causal_sum(q, k, v, size=64):
    state, out = 0.0, []
    for q_, k_, v_ in zip(*(x.split(size, 2) for x in (q, k, v))):
        old = q_ @ state if out else 0.0
        out.append(old + (q_ @ k_.transpose(-1, -2)).tril() @ v_)
        state = state + k_.transpose(-1, -2) @ v_
    return torch.cat(out, 2)


def near(block, q, k, v, mask):
    """Softmax attention among the frames nearer than w, w queries at a time. (B, H, T, K) -> (B, H, T, K)."""
    w, length, parts = block.options["window"], q.shape[2], 2 if block.options["causal"] else 3
    more = -length % w
    cut = lambda x: F.pad(x, (0, 0, w, more + (parts - 2) * w)).unfold(2, parts * w, w)  # noqa: E731  (B, H, n, K, *)
    time = torch.arange(parts * w, device=q.device)
    ahead = time - w - time[:w, None]
    seen = (ahead.abs() < w) & ((ahead <= 0) | (not block.options["causal"]))
    valid = torch.ones_like(q[:, :1, :, :1]) if mask is None else mask[:, None, :, None].to(q.dtype)
    scores = F.pad(q * block.scale, (0, 0, 0, more)).unflatten(2, (-1, w)) @ cut(k)                   # (B, H, n, w, *)
    scores = scores.float().masked_fill(~seen | (cut(valid) == 0), torch.finfo(torch.float).min)
    return (scores.softmax(-1) @ cut(v.float()).transpose(-1, -2)).flatten(2, 3)[:, :, :length]


class Features(nn.Module):
    """A learnt linear map for each head: of Hedgehog before [softmax(h), softmax(-h)], of T2R before a ReLU."""

    def __init__(self, heads, features, size, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, features, size) * size**-0.5)
        self.bias = nn.Parameter(torch.zeros(heads, features)) if bias else None

    def forward(self, x):                                                                # (B, H, T, K)
        h = torch.einsum("bhtk,hfk->bhtf", x, self.weight).float()
        if self.bias is not None:
            return (h + self.bias[:, None].float()).relu()
        return torch.cat([h.softmax(-1), (-h).softmax(-1)], -1)                          # (B, H, T, 2F)


# part: linformer
def mixtures(block, k, v, mask):
    """Linformer: E[:n]^T K / sqrt(n), F[:n]^T V / sqrt(n) of the n valid frames. (B, H, T, K) -> (B, H, R, K)."""
    length, matrix = k.shape[2], block.E if hasattr(block, "E") else block.first[0].E
    if length > len(matrix):
        raise ValueError(f"{length} frames, but the Linformer projection has {len(matrix)} rows.")
    count = length
    if mask is not None:
        count = mask.sum(-1).clamp_min(1)[:, None, None, None]
        k, v = k * mask[:, None, :, None], v * mask[:, None, :, None]
    scale = count**-0.5 if mask is None else count.to(k.dtype).rsqrt()
    mix = lambda x, e: torch.einsum("bhtk,tr->bhrk", x, e[:length]) * scale  # noqa: E731
    return mix(k, matrix), mix(v, getattr(block, "F", matrix))


def tie(model):
    """Linformer with sharing `layer`: the matrix of the first such layer is that of all."""
    found = [m for m in model.modules() if isinstance(m, Attention) and m.kept and m.options.get("sharing") == "layer"]
    for block in found[1:]:
        del block.E
        block.__dict__["first"] = [found[0]]  # in a list: not registered, so stored once


# part: recurrent
def recur(block, x, mask):
    """A recurrent mixer in the direction(s) of its block: (B, T, D) -> (B, T, D)."""
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    if block.options["direction"] == "shared":
        return block.shared(x, mask)
    y = block.fwd(x, mask)
    if block.options["direction"] == "causal":
        return y
    y = y + block.bwd(x.flip(1), mask.flip(1)).flip(1)
    return y / 2 if block.options["direction"] == "mean" else y


class Scale(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):                                                                # RMS norm of the last axis
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()


class Recurrent(nn.Module):
    """What all have: an input projection, a depthwise convolution with SiLU, an output projection."""

    def __init__(self, width, o, sizes):
        super().__init__()
        self.o, self.inner, self.sizes = o, o["inner"] or width, sizes
        channels = sizes[0] if "rank" in o else sizes[1]
        self.in_proj = nn.Linear(width, sum(sizes), bias=o["bias"])
        self.conv1d = nn.Conv1d(channels, channels, o["conv"], groups=channels)
        self.out_proj = nn.Linear(self.inner, width, bias=o["bias"])
        if "head_dim" in o:
            self.heads = self.inner // o["head_dim"]
            self.A_log, self.dt_bias = (nn.Parameter(torch.zeros(self.heads)) for _ in range(2))

    def convolve(self, x, mask, left):
        x = (x * mask[..., None]).transpose(1, 2)
        return F.silu(self.conv1d(F.pad(x, (left, self.o["conv"] - 1 - left)))).transpose(1, 2)

    def by_head(self, x, heads=None):
        return x.unflatten(-1, (heads or self.heads, -1))


class Mamba2(Recurrent):
    """Mamba-2 (arXiv 2405.21060)."""

    def __init__(self, width, o):
        inner = o["inner"] or width
        super().__init__(width, o, (inner, inner + 2 * o["groups"] * o["state"], inner // o["head_dim"]))
        self.D, self.norm = nn.Parameter(torch.ones(self.heads)), Scale(self.inner)

    def forward(self, x, mask):
        z, xbc, dt = self.in_proj(x).split(self.sizes, -1)
        part = self.o["groups"] * self.o["state"]
        h, b, c = self.convolve(xbc, mask, self.o["conv"] - 1).float().split((self.inner, part, part), -1)
        dt = F.softplus(dt.float() + self.dt_bias) * mask[..., None]
        h, b, c = self.by_head(h), self.by_head(b, self.o["groups"]), self.by_head(c, self.o["groups"])
        y = ssd(h, dt, -self.A_log.float().exp(), b, c) + self.D[:, None] * h
        y = y.flatten(2) * F.silu(z.float())
        y = y.unflatten(-1, (self.o["groups"], -1))
        y = (y * (y.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(2) * self.norm.weight
        return self.out_proj(y.to(x.dtype))


class Hydra(Recurrent):
    """Hydra (arXiv 2407.09941): Mamba-2 both ways with shared parameters."""

    def __init__(self, width, o):
        inner = o["inner"] or width
        super().__init__(width, o, (inner, inner + 4 * o["groups"] * o["state"], 2 * (inner // o["head_dim"])))
        self.D, self.norm = nn.Parameter(torch.ones(self.heads)), Scale(self.inner)
        self.fc_D = nn.Linear(self.inner, self.heads, bias=False)

    def forward(self, x, mask):
        z, xbc, dt = self.in_proj(x).split(self.sizes, -1)
        part = self.o["groups"] * self.o["state"]
        h, *bc = self.convolve(xbc, mask, (self.o["conv"] - 1) // 2).float().split((self.inner, *[part] * 4), -1)
        h, y = h * mask[..., None], 0.0
        for way, d in enumerate(dt.float().chunk(2, -1)):
            d = F.softplus(d + self.dt_bias) * mask[..., None]
            b, c = (self.by_head(v, self.o["groups"]) for v in bc[2 * way : 2 * way + 2])
            turn = (lambda v: v.flip(1)) if way else lambda v: v  # noqa: E731
            one = ssd(*(turn(v) for v in (self.by_head(h), d)), -self.A_log.float().exp(), turn(b), turn(c))
            y = y + turn(F.pad(one, (0, 0, 0, 0, 1, 0))[:, :-1])                         # what lies beyond each frame
        y = y + (self.fc_D(h.to(x.dtype)).float() + self.D)[..., None] * self.by_head(h)
        return self.out_proj((self.norm(y.flatten(2)) * F.silu(z.float())).to(x.dtype))


def ssd(x, dt, a, b, c, size=64):
    """s_t = exp(dt_t a) s_{t-1} + dt_t x_t b_t^T, y_t = s_t c_t, a chunk at a time. x (B, T, H, P), dt (B, T, H),
    a (H,), b, c (B, T, G, N) -> (B, T, H, P)."""
    b, c = (v.repeat_interleave(x.shape[2] // v.shape[2], 2) for v in (b, c))
    state, out = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], b.shape[3]), []
    for x_, dt_, b_, c_ in zip(*(v.split(size, 1) for v in (x * dt[..., None], dt, b, c))):
        total = (dt_ * a).cumsum(1).transpose(1, 2)                                      # (B, H, Q)
        scores = torch.einsum("bihn,bjhn->bhij", c_, b_) * decays(total)
        old = torch.einsum("bihn,bhpn->bihp", c_, state) * total.exp().transpose(1, 2)[..., None]
        out.append(old + torch.einsum("bhij,bjhp->bihp", scores, x_))
        left = (total[..., -1:] - total).exp().transpose(1, 2)[..., None]
        state = total[..., -1].exp()[..., None, None] * state + torch.einsum("bjhn,bjhp->bhpn", b_, x_ * left)
    return torch.cat(out, 1)


def decays(total):
    """Sums of log decays (..., Q) -> the decay from j to i >= j, else zero (..., Q, Q)."""
    lower = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).tril()
    return (total[..., :, None] - total[..., None, :]).masked_fill(~lower, -torch.inf).exp()


class Mamba(Recurrent):
    """Mamba (arXiv 2312.00752); frame by frame."""

    def __init__(self, width, o):
        inner, self.rank = o["inner"] or width, o["rank"] or -(-width // 16)
        rank = self.rank
        super().__init__(width, o, (inner, inner))
        self.rank = rank
        self.x_proj, self.dt_proj = nn.Linear(inner, rank + 2 * o["state"], bias=False), nn.Linear(rank, inner)
        self.A_log, self.D = nn.Parameter(torch.zeros(inner, o["state"])), nn.Parameter(torch.ones(inner))

    def forward(self, x, mask):
        h, z = self.in_proj(x).split(self.sizes, -1)
        h = self.convolve(h, mask, self.o["conv"] - 1)
        dt, b, c = self.x_proj(h).split((self.rank, self.o["state"], self.o["state"]), -1)
        dt, a = F.softplus(self.dt_proj(dt).float()) * mask[..., None], -self.A_log.float().exp()
        h, b, c, out = h.float(), b.float(), c.float(), []
        state = h.new_zeros(h.shape[0], h.shape[2], self.o["state"])
        for t in range(h.shape[1]):
            state = (dt[:, t, :, None] * a).exp() * state + (dt[:, t] * h[:, t])[..., None] * b[:, t, None]
            out.append((state @ c[:, t, :, None])[..., 0])
        y = (torch.stack(out, 1) + self.D * h) * F.silu(z.float())
        return self.out_proj(y.to(x.dtype))


class GatedDeltaNet(Recurrent):
    """Gated DeltaNet (arXiv 2412.06464)."""

    def __init__(self, width, o):
        inner = o["inner"] or width
        super().__init__(width, o, (inner, 3 * inner, *[inner // o["head_dim"]] * 2))
        self.norm = Scale(o["head_dim"])

    def forward(self, x, mask):
        z, qkv, beta, dt = self.in_proj(x).split(self.sizes, -1)
        qkv = self.convolve(qkv, mask, self.o["conv"] - 1).float()
        q, k, v = (self.by_head(h).transpose(1, 2) for h in qkv.chunk(3, -1))
        q, k = (h * (h.pow(2).sum(-1, keepdim=True) + 1e-6).rsqrt() for h in (q, k))                 # (B, H, T, K)
        beta = (beta.float().sigmoid() * mask[..., None]).transpose(1, 2)
        g = -self.A_log.float().exp() * F.softplus(dt.float() + self.dt_bias) * mask[..., None]
        y = delta(q * q.shape[-1] ** -0.5, k, v, beta, g.transpose(1, 2)).transpose(1, 2)
        return self.out_proj((self.norm(y).flatten(2) * F.silu(z.float())).to(x.dtype))


def delta(q, k, v, beta, g, size=64):
    """s_t = exp(g_t) (I - beta_t k_t k_t^T) s_{t-1} + beta_t k_t v_t^T, y_t = s_t^T q_t, a chunk at a time.
    All (B, H, T, *)."""
    state, out = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1]), []
    for q_, k_, v_, beta_, g_ in zip(*(x.split(size, 2) for x in (q, k, v, beta, g))):
        total, b = g_.cumsum(-1), beta_[..., None]
        decay, above = decays(total), total.exp()[..., None]
        system = ((k_ * b) @ k_.transpose(-1, -2) * decay).tril(-1)
        right = torch.cat([v_ * b, k_ * b * above], -1)
        u, w = torch.linalg.solve_triangular(system + torch.eye(system.shape[-1], device=q.device), right, upper=False,
                                             unitriangular=True).split((v.shape[-1], k.shape[-1]), -1)
        new = u - w @ state
        out.append((q_ * above) @ state + (q_ @ k_.transpose(-1, -2) * decay) @ new)
        left = (total[..., -1:] - total).exp()[..., None]
        state = total[..., -1].exp()[..., None, None] * state + (k_ * left).transpose(-1, -2) @ new
    return torch.cat(out, 2)


class GatedLinearAttention(nn.Module):
    """Gated linear attention (arXiv 2312.06635)."""

    def __init__(self, width, o):
        super().__init__()
        inner = o["inner"] or width
        self.heads, self.tau = inner // o["head_dim"], o["tau"]
        keys = self.heads * o["key_dim"]
        self.sizes = (inner, keys, keys, inner, o["rank"])
        self.in_proj, self.gk_proj = nn.Linear(width, sum(self.sizes)), nn.Linear(o["rank"], keys)
        self.norm, self.out_proj = Scale(o["head_dim"]), nn.Linear(inner, width, bias=o["bias"])

    def forward(self, x, mask):
        z, q, k, v, low = self.in_proj(x).split(self.sizes, -1)
        g = F.logsigmoid(self.gk_proj(low).float()) / self.tau * mask[..., None]
        k = k * mask[..., None]
        q, k, v, g = (h.float().unflatten(-1, (self.heads, -1)).transpose(1, 2) for h in (q, k, v, g))
        y = self.norm(gated(q * q.shape[-1] ** -0.5, k, v, g).transpose(1, 2))           # (B, T, H, V)
        return self.out_proj((y.flatten(2) * F.silu(z.float())).to(x.dtype))


def gated(q, k, v, g, size=16):
    """s_t = diag(exp(g_t)) s_{t-1} + k_t v_t^T, y_t = s_t^T q_t, a chunk at a time. All (B, H, T, *)."""
    state, out = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1]), []
    for q_, k_, v_, g_ in zip(*(x.split(size, 2) for x in (q, k, v, g))):
        total = g_.cumsum(2)                                                             # (B, H, Q, K)
        scores = torch.einsum("bhik,bhjk,bhkij->bhij", q_, k_, decays(total.transpose(-1, -2)))
        out.append((q_ * total.exp()) @ state + scores @ v_)
        left = (total[:, :, -1:] - total).exp()
        state = total[:, :, -1, :, None].exp() * state + (k_ * left).transpose(-1, -2) @ v_
    return torch.cat(out, 2)
