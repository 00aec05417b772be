"""The network: a decoder-only transformer, one model with two settings (Llama and GPT-2).

Pre-training asks one question of every position of a text: given the tokens so far, how probable was the one that came?

    p(x_1 ... x_T)  =  prod_t p(x_t | x_<t)            L  =  -sum_t log p(x_t | x_<t)        (nats; / ln 2 = bits)

An untrained model knows nothing: L is log(V) per token, 7.6 nats for a vocabulary of 2048. Training lowers that number,
and everything else in this repository exists to lower it for less money. The function is a stack of blocks on a
residual stream x, (B, T, C):

    x = E[tokens]                      embedding                      E (V, C)
    x = x + Attention(Norm(x))         tokens exchange information    4 C^2 weights (fewer with grouped heads)
    x = x + MLP(Norm(x))               each token by itself           3 C F weights (2 C F with GELU)
    logits = Norm(x) W^T               head                           W (V, C), or W = E when tied

             norm        position             mlp                                      biases   K/V heads
    Llama    RMSNorm     rotary (RoPE)        SwiGLU: W_down(silu(W_gate x) * W_up x)  none     grouped
    GPT-2    LayerNorm   learned, added to x  GELU:   W_down gelu(W_up x)              all      one per query head

    in shapes:  B micro-batch   T positions   S keys (T, and what the cache holds)   V vocab_size   N = B T in the loss
                C n_embd   H n_head   K n_kv_head   D head_dim   F n_ff

A token costs 6 FLOPs per weight that is multiplied, 2 forward and 4 backward, and 12 H D T per layer for attention
(`flops_per_token`). The demo compares that with what torch counts.

Three things differ from the textbook, because other files need them:
  * A weight's *name* seeds its random numbers (`keyed_init`). Any slice of a weight can be made without the rest. So
    ranks that hold pieces of the model start equal to one process that holds all of it.
  * The loss never holds the (N, V) logits: for 4096 tokens and 50,304 words they alone are 824 MB. It computes a few
    rows at a time, and in the same pass the gradients that these rows give (`ChunkedCrossEntropy`).
  * Attention is a function that is handed in, the head is a module, layers are a dictionary: other files replace them
    from outside. Nothing below talks to another rank. Device and dtype are the caller's choice.

Map: ModelConfig - parts of a block - the loss - GPT - weights by name - counting - SFT, DPO, RL. Below the lecture:
Hugging Face - demo. Not here: tiling of attention (flash_attn.py), ranks (parallel.py), number formats (precision.py).

Sources: Vaswani 2017 (arXiv:1706.03762); GPT-2 (Radford 2019); RMSNorm (1910.07467); RoPE (2104.09864); SwiGLU
(2002.05202); GQA (2305.13245); QK-norm as in Qwen3 (2505.09388); Llama 2 (2307.09288).

run: python model.py
"""

import functools
import hashlib
import math
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class ModelConfig:
    """What decides the shapes and the function. Raises ValueError: one line that names the field and the rule."""

    vocab_size: int
    seq_len: int                 # longest context (rows of a learned position table; generation's window)
    n_layer: int
    n_head: int
    n_kv_head: int               # query heads per K/V head = n_head / n_kv_head; 1 = multi-query
    head_dim: int
    n_embd: int
    n_ff: int
    norm: str = "rmsnorm"        # "rmsnorm" | "layernorm"
    position: str = "rope"       # "rope" | "learned"
    mlp: str = "swiglu"          # "swiglu" | "gelu"
    bias: bool = False           # of every linear layer and LayerNorm but the head
    tie_embeddings: bool = False  # the head's weight is the embedding's
    qk_norm: bool = False        # RMSNorm over each head of q and k, before RoPE
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        for name in ("vocab_size", "seq_len", "n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "n_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, allowed in (("norm", ("rmsnorm", "layernorm")), ("position", ("rope", "learned")),
                              ("mlp", ("swiglu", "gelu"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head must be a multiple of n_kv_head, got {self.n_head} and {self.n_kv_head}")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim must be even with rope, got {self.head_dim}")


# ---- the parts of a block --------------------------------------------------------------------------------------------

def make_norm(config: ModelConfig) -> nn.Module:
    """Over the last dimension. RMSNorm: x / sqrt(mean(x^2) + eps) * weight. LayerNorm: of x - mean(x), then a bias."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)


def rope_table(config: ModelConfig, start: int, length: int, like: torch.Tensor):
    """cos and sin of the rotation angles at positions t = start ... start + length - 1: each (T, D/2) with T = length,
    in the dtype of `like`. Angles are computed in float32.

    angle(t, i) = t * theta^(-2 i / D)            pair i is a clock hand that turns once in 2 pi theta^(2 i / D) tokens
    """
    D = config.head_dim
    inv_freq = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, device=like.device, dtype=torch.float32) / D)   # (D/2)
    t = torch.arange(start, start + length, device=like.device, dtype=torch.float32)                             # (T)
    angle = t[:, None] * inv_freq                                                                             # (T, D/2)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def apply_rope(x, cos, sin):
    """Rotate each pair (x_i, x_{i + D/2}) of a head by angle(t, i). In q_t . k_s the two angles subtract: of the
    positions only t - s remains. x (B, T, H, D). (The paper pairs neighbours; Hugging Face's weights need halves.)"""
    x1, x2 = x.chunk(2, dim=-1)                                                                # (B, T, H, D/2) each
    cos, sin = cos[:, None], sin[:, None]                                                      # (T, 1, D/2)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)                       # (B, T, H, D)


def document_mask(documents, dtype):
    """Ids (B, T) -> what is added to the scores, (B, 1, T, T): 0 where a query may see a key (of its own document, at
    or before itself), -inf elsewhere. A document is a run of equal ids: an id that comes back is a new document."""
    number = F.pad((documents[:, 1:] != documents[:, :-1]).cumsum(1), (1, 0))                # ids 7 7 3 7 -> 0 0 1 2
    visible = (number[:, None, :, None] == number[:, None, None, :]).tril()                          # (B, 1, T, T)
    return torch.zeros(visible.shape, dtype=dtype, device=documents.device).masked_fill(~visible, -math.inf)


def sdpa_attention(q, k, v, *, documents=None):
    """Default attention: torch's, causal. q (B, H, T, D); k, v (B, K, S, D) -> (B, H, T, D). Query i sits at key
    position i + S - T: the last query sees every key, so a query alone (T = 1) needs no mask. documents: what
    document_mask returned; then T = S."""
    T, S, mask = q.shape[-2], k.shape[-2], documents
    if mask is None and 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    is_causal = mask is None and T == S
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1])


class KVCache:
    """Keys and values of the tokens already read, one pair per attention layer: only new tokens are projected."""

    def __init__(self):
        self.length = 0                                                    # tokens read: GPT.forward counts, not extend
        self.layers = {}

    def extend(self, layer, k, v):
        if layer in self.layers:
            k, v = (torch.cat((old, new), dim=2) for old, new in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = k, v                                                              # (B, K, S, D) each
        return k, v


# torch's checkpoint(f, x) keeps x, not f's intermediates: backward runs f again. No dropout: no random state to restore
RECOMPUTE = dict(use_reentrant=False, preserve_rng_state=False)


class Attention(nn.Module):
    """o = softmax(q k^T / sqrt(D)) v for each head, then one mixing matrix. (B, T, C) -> (B, T, C).

    The number of heads is read off the projections' outputs: a tensor-parallel rank has fewer. H | K: q's H, k's K.
    """

    def __init__(self, c: ModelConfig, attention):
        super().__init__()
        self.q_proj = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=c.bias)
        self.k_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.bias)
        self.v_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.bias)
        self.o_proj = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=c.bias)
        self.q_norm = nn.RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.attention, self.head_dim = attention, c.head_dim

    def forward(self, x, rope=None, documents=None, cache=None):
        q, k, v = (project(x) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.view(*y.shape[:2], -1, self.head_dim) for y in (q, k, v))                 # (B, T, H | K, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)                      # (B, H | K, T, D), views
        if cache is not None:
            k, v = cache.extend(self, k, v)                                                    # (B, K, S, D)
        o = self.attention(q, k, v, documents=documents)                                       # (B, H, T, D)
        return self.o_proj(o.transpose(1, 2).flatten(2))                                       # (B, T, C)


class MLP(nn.Module):
    """SwiGLU: W_down(silu(W_gate x) * W_up x), or GELU: W_down gelu(W_up x). (B, T, C) -> (B, T, C)."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.n_embd, c.n_ff, bias=c.bias) if c.mlp == "swiglu" else None
        self.up_proj = nn.Linear(c.n_embd, c.n_ff, bias=c.bias)
        self.down_proj = nn.Linear(c.n_ff, c.n_embd, bias=c.bias)

    def forward(self, x):
        up = self.up_proj(x)                                                                   # (B, T, F)
        inner = F.gelu(up, approximate="tanh") if self.gate_proj is None else F.silu(self.gate_proj(x)) * up
        return self.down_proj(inner)                                                           # (B, T, C)


class Block(nn.Module):
    """x + Attention(Norm(x)), then x + MLP(Norm(x)). recompute: "none" keeps every intermediate for backward,
    "selective" all but those between q, k, v and o. "full" keeps x alone, and backward first runs the block again: 8
    FLOPs per weight instead of 6."""

    def __init__(self, config: ModelConfig, attention, recompute: str):
        super().__init__()
        if recompute == "selective":
            attention = functools.partial(checkpoint, attention, **RECOMPUTE)
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config, attention)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)
        self.recompute = recompute == "full"

    def forward(self, x, rope=None, documents=None, cache=None):
        if self.recompute:                                                 # without gradients this calls self.run alone
            return checkpoint(self.run, x, rope, documents, cache, **RECOMPUTE)
        return self.run(x, rope, documents, cache)

    def run(self, x, rope, documents, cache):
        x = x + self.self_attn(self.input_layernorm(x), rope, documents, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


# ---- the loss --------------------------------------------------------------------------------------------------------

def plain_cross_entropy(x, weight, targets, weights):
    """The head's loss and its gradients, as on the board. x (N, C), weight (V, C), targets (N,) int, weights (N,).
    Returns loss = -sum_n w_n log softmax(z_n)[target_n] with z = x W^T, dloss/dx (N, C) and dloss/dW (V, C)."""
    p = (x @ weight.T).softmax(-1)                                                             # (N, V)
    loss = -(weights * p.gather(1, targets[:, None])[:, 0].log()).sum()
    dz = weights[:, None] * (p - F.one_hot(targets, len(weight)))                              # softmax minus one-hot
    return loss, dz @ weight, dz.T @ x


def softmax_nll(z, targets, weights, with_grad: bool):
    """The lines of plain_cross_entropy between the matrix products, for some rows. z (n, V): logits, overwritten unless
    they have 16 bits. Returns nll (n,) = -log softmax(z)[target], 0 where targets are negative, and dz (n, V) in z's
    dtype or, without with_grad, None. Sums are in float32 (float64 for float64).

    Run line by line, this reads the logits about ten times. torch.compile, given this function, makes fewer passes.
    """
    acc, dtype = torch.promote_types(z.dtype, torch.float32), z.dtype
    has_target, index = targets[:, None] >= 0, targets[:, None].clamp(min=0)                   # (n, 1)
    z = z.to(acc)
    z -= z.amax(dim=1, keepdim=True)                                            # no exp overflows; softmax is the same
    z_target = z.gather(1, index)
    exp_z = z.exp_()
    total = exp_z.sum(dim=1, keepdim=True)
    nll = ((total.log() - z_target) * has_target)[:, 0]
    if not with_grad:
        return nll, None
    # dz = w exp(z) / total, and at the target w (exp(z_target) / total - 1)
    w = weights[:, None] * has_target
    dz = exp_z.mul_(w / total).to(dtype)
    return nll, dz.scatter_(1, index, (w * (z_target.exp() / total - 1)).to(dtype))


class ChunkedCrossEntropy(torch.autograd.Function):
    """plain_cross_entropy, a few rows at a time: the logits of all rows never exist.

    Backward only brings a factor, g = dL/dloss: dx and dW are g times what is known in forward. So forward computes
    them while a chunk's logits are there, with the same 3 matrix products as the plain head, and backward multiplies
    by g. Until then dx and dW are kept in float32 (or float64): fp16 would lose small values. The price is to keep dW.
    (The other way computes the logits again in backward: it keeps no dW, and takes a fourth product.)
    """

    @staticmethod
    def forward(ctx, x, weight, targets, weights, rows, with_grad, softmax):
        ctx.dtypes, N, device = (x.dtype, weight.dtype), x.shape[0], x.device
        acc = torch.promote_types(x.dtype, torch.float32)
        nll = torch.empty(N, dtype=acc, device=device)
        dx = torch.empty(x.shape, dtype=acc, device=device) if with_grad else None
        dw = torch.zeros(weight.shape, dtype=acc, device=device) if with_grad else None
        for lo in range(0, N, rows):
            chunk = slice(lo, lo + rows)
            nll[chunk], dz = softmax(x[chunk] @ weight.T, targets[chunk], weights[chunk], with_grad)    # z (n, V)
            if with_grad:
                dx[chunk] = dz @ weight                                                                 # (n, C)
                if dz.dtype == acc:
                    torch.addmm(dw, dz.T, x[chunk], out=dw)                                             # (V, C)
                else:                                               # torch adds no product of 16 bits to float32
                    dw += dz.T @ x[chunk]
        if with_grad:
            ctx.save_for_backward(dx, dw)
        ctx.mark_non_differentiable(nll)
        return (weights * nll).sum(), nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, _):
        dx, dw = ctx.saved_tensors                # changed in place below: torch notices, and refuses a second backward
        return dx.mul_(g).to(ctx.dtypes[0]), dw.mul_(g).to(ctx.dtypes[1]), *[None] * 5


def chunked_cross_entropy(x, weight, targets, weights=None, rows=None, softmax=softmax_nll):
    """Linear layer and cross entropy in one. x (N, C), weight (V, C), targets (N,) int (negative: no target), weights
    (N,), default 1.

    Returns (loss, nll): loss = sum of weights * nll, differentiable in x and weight; nll (N,) detached, 0 without
    target. The logits of `rows` rows exist at a time. Default: as many rows as make 2 million logits on a CPU (8 MB,
    near its caches), 64 million elsewhere, but at least 256, since each chunk adds to all of dW. softmax: softmax_nll,
    or what torch.compile made of it. Raises ValueError for a target >= V, on a CPU alone: a GPU would have to wait.
    """
    if targets.device.type == "cpu" and targets.numel() and int(targets.max()) >= weight.shape[0]:
        raise ValueError(f"targets must be below vocab_size {weight.shape[0]}, got {int(targets.max())}")
    rows = rows or max(256, (2**21 if x.device.type == "cpu" else 2**26) // weight.shape[0])
    if weights is None:
        weights = torch.ones(targets.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return ChunkedCrossEntropy.apply(x, weight, targets, weights, rows, torch.is_grad_enabled(), softmax)


class Head(nn.Module):
    """W (V, C). Without targets: logits (B, T, V). With: (loss, nll) as in GPT.forward. Tensor parallelism puts another
    head in its place."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.n_embd))
        self.softmax = softmax_nll

    def forward(self, x, targets=None, weights=None):
        if targets is None:
            return F.linear(x, self.weight)
        loss, nll = chunked_cross_entropy(x.flatten(0, -2), self.weight, targets.flatten(),
                                          None if weights is None else weights.flatten(), softmax=self.softmax)
        return loss, nll.view(targets.shape)


# ---- the model -------------------------------------------------------------------------------------------------------

class GPT(nn.Module):
    """The whole network, or a pipeline stage of it: train.py sets what the stage lacks (model.embed_tokens and
    embed_positions, model.norm and lm_head) to None and deletes layers. Names are Hugging Face's for Llama, and stay.
    A parameter may be a piece of a weight. Its attributes say which: `full_name`, the name in the whole model, and
    `box`, one (start, stop, size) per dimension.

    Every layer calls attention(q, k, v, documents=), which is causal. Its documents are prepare(ids, dtype of x), made
    once per forward for all layers. Default for prepare: document_mask with sdpa_attention, else none (the ids as they
    are). The weights of GPT(config) are of no use yet: build(config, seed) draws them.
    """

    def __init__(self, config: ModelConfig, attention=sdpa_attention, recompute: str = "none", prepare=None):
        super().__init__()
        if recompute not in ("none", "selective", "full"):
            raise ValueError(f"recompute must be one of none, selective, full, got {recompute!r}")
        self.config = c = config
        self.prepare = document_mask if prepare is None and attention is sdpa_attention else prepare
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.n_embd)
        self.model.embed_positions = nn.Embedding(c.seq_len, c.n_embd) if c.position == "learned" else None
        self.model.layers = nn.ModuleDict({str(i): Block(c, attention, recompute) for i in range(c.n_layer)})
        self.model.norm = make_norm(c)
        self.lm_head = Head(c)
        if c.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, p in self.named_parameters():
            p.full_name, p.box = name, tuple((0, size, size) for size in p.shape)

    def forward(self, tokens, targets=None, *, weights=None, documents=None, hidden=None, cache=None):
        """tokens (B, T) int -> hidden (B, T, C) | logits (B, T, V) | (loss, nll), whichever this stage ends in.

        targets    (B, T) int, negative where there is none. weights: (B, T), default 1
        documents  (B, T) ids: positions attend within a run of equal ids
        hidden     (B, T, C), what the stage before returned. cache: a KVCache, whose tokens come before these
        loss       the *sum* of weights * nll, not the mean: the caller adds micro-batches and ranks, and divides once
        nll        (B, T) of -log p(target), detached, in nats
        """
        m, start, T = self.model, 0 if cache is None else cache.length, tokens.shape[1]
        x = hidden
        if m.embed_tokens is not None:
            x = m.embed_tokens(tokens)                                                         # (B, T, C)
            if m.embed_positions is not None:
                if start + T > self.config.seq_len:
                    raise ValueError(f"tokens must fit seq_len {self.config.seq_len} with learned positions, "
                                     f"got {start + T}")
                x = x + m.embed_positions(torch.arange(start, start + T, device=tokens.device))
        rope = rope_table(self.config, start, T, x) if self.config.position == "rope" else None
        if documents is not None and self.prepare is not None:
            documents = self.prepare(documents, x.dtype)
        for layer in m.layers.values():
            x = layer(x, rope, documents, cache)
        if cache is not None:
            cache.length += T
        x = x if m.norm is None else m.norm(x)
        return x if self.lm_head is None else self.lm_head(x, targets, weights)

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, seed: int | list[int] = 0, stop: int | None = None,
                 vocab_size: int | None = None, use_cache: bool = True, lengths: list[int] | None = None):
        """Continue tokens (B, T) int by up to max_new_tokens -> (B, T + new). temperature 0 takes the likeliest token.

        top_k       keep the k likeliest tokens. top_p: keep the fewest likeliest whose probabilities reach p
        seed        one for all rows, or one per row: then a row's samples do not depend on the rest of the batch
        stop        the token that ends a row: the row is filled with it. When all rows have ended, generation ends
        vocab_size  never take ids >= vocab_size: a tokenizer may have fewer pieces than the model has rows
        lengths     tokens of each row's prompt, where they differ; the rest of the row is not read. All rows move one
                    column at a time: a row takes the prompt's token while it has one, else a sampled one. So no mask

        A prompt is cut to its last seq_len tokens. A context that outgrows seq_len is cut to its last seq_len / 2, and
        the cache is built again. The same cuts are made without a cache: results agree.
        Raises ValueError for an empty prompt or values out of range.
        """
        lengths = [tokens.shape[1]] * len(tokens) if lengths is None else lengths
        first = min(lengths, default=0)
        for name, value, rule, ok in (
                ("tokens", first, "not be empty", first > 0),
                ("temperature", temperature, "be at least 0", temperature >= 0),
                ("top_k", top_k, "be at least 1", top_k is None or top_k >= 1),
                ("top_p", top_p, "be in (0, 1]", top_p is None or 0 < top_p <= 1)):
            if not ok:
                raise ValueError(f"{name} must {rule}, got {value}")
        seeds = seed if isinstance(seed, list) else [seed]
        generators = [torch.Generator(tokens.device).manual_seed(s) for s in seeds]
        prompt, tokens = tokens, tokens[:, :first]
        ends = torch.tensor(lengths, device=tokens.device)
        start, cache = max(0, first - self.config.seq_len), KVCache()                        # the context's first token
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for position in range(first, max(lengths) + max_new_tokens):
            if position - start > self.config.seq_len:
                start, cache = position - max(1, self.config.seq_len // 2), KVCache()
            unread = tokens[:, start + cache.length:]
            logits = self(unread, cache=cache if use_cache else None)[:, -1]                   # (B, V)
            if vocab_size is not None:
                logits[:, vocab_size:] = -math.inf
            token = sample_token(logits, temperature, top_k, top_p, generators)                # (B, 1)
            if position < max(lengths):                                        # some rows are still in their prompts
                for s, generator, length in zip(seeds, generators, lengths, strict=False):
                    if position == length - 1:                   # forget this draw: the next is the row's first token
                        generator.manual_seed(s)
                token = torch.where((position < ends)[:, None], prompt[:, position:position + 1], token)
            if stop is not None:
                token = token.masked_fill(ended[:, None], stop)
                ended |= (token[:, 0] == stop) & (position >= ends)
            tokens = torch.cat((tokens, token), 1)
            if stop is not None and bool(ended.all()):
                break
        return tokens


def sample_token(logits, temperature, top_k, top_p, generators):
    """One token per row from logits (B, V) -> (B, 1). generators: one for all rows, or one per row."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None:
        p, order = logits.softmax(-1).sort(descending=True, stable=True)
        drop = p.cumsum(-1) - p >= top_p              # the likelier ones alone already reach top_p; the first stays
        logits = logits.masked_fill(drop.scatter(1, order, drop), -math.inf)
    rows = logits.softmax(-1).chunk(len(generators))
    return torch.cat([torch.multinomial(p, 1, generator=g) for p, g in zip(rows, generators, strict=True)])


# ---- weights by name -------------------------------------------------------------------------------------------------

CHUNK = 2**20      # elements drawn by one generator


def keyed_init(full_name: str, box, seed: int, config: ModelConfig) -> torch.Tensor:
    """The slice `box` of the initial weight `full_name`: CPU, float32. box = ((start, stop, size), ...).

    The full tensor, row by row, is cut into chunks of 2**20 elements. Chunk number c is drawn from a generator of its
    own, whose key is a hash of seed, name and c. A slice draws the chunks from its first to its last element, holds one
    chunk at a time, and equals the same slice of the full tensor bit for bit.
    """
    shape = [stop - start for start, stop, _ in box]
    if full_name.endswith("norm.weight"):
        return torch.ones(shape)
    if full_name.endswith(".bias") or 0 in shape:
        return torch.zeros(shape)
    sizes = [size for _, _, size in box]
    out, filled = np.empty(math.prod(shape), np.float32), 0
    # where the box's first and last element lie in the full tensor: no chunk before or after them is touched
    first = int(np.ravel_multi_index([start for start, _, _ in box], sizes))
    last = int(np.ravel_multi_index([stop - 1 for _, stop, _ in box], sizes))
    for c in range(first // CHUNK, last // CHUNK + 1):
        lo, hi = c * CHUNK, min((c + 1) * CHUNK, math.prod(sizes))
        key = hashlib.blake2b(f"{seed}/{full_name}/{c}".encode(), digest_size=16).digest()
        stream = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        values = stream.standard_normal(hi - lo, np.float32)
        if shape != sizes:                                   # keep those inside the box: their order is the box's, too
            inside = np.ones(hi - lo, bool)
            for index, (start, stop, _) in zip(np.unravel_index(np.arange(lo, hi), sizes), box, strict=True):
                inside &= (start <= index) & (index < stop)
            values = values[inside]
        out[filled:filled + len(values)] = values
        filled += len(values)
    # std 0.02, as in GPT-2. The outputs of o_proj and down_proj are summed in the residual stream, 2 n_layer of them:
    # these weights are divided by sqrt(2 n_layer), so that the sum does not grow with depth
    adds = full_name.endswith(("o_proj.weight", "down_proj.weight"))
    return torch.from_numpy(out.reshape(shape)) * (0.02 / math.sqrt(2 * config.n_layer) if adds else 0.02)


def fill(module: nn.Module, read, device="cpu", dtype=torch.float32) -> nn.Module:
    """Replace every parameter by read(full_name, box) in device and dtype. In place. The old parameters usually are on
    torch's meta device: they have a shape and no memory.

    `read` calls keyed_init, or reads a checkpoint or a Hugging Face folder. Parameters keep their attributes, tied ones
    stay tied, and `read` is asked for one tensor at a time. Raises ValueError if its shape is not the parameter's.
    """
    filled = {}
    for sub in module.modules():
        for name, p in sub._parameters.items():
            if p is None:
                continue
            if p not in filled:
                value = read(p.full_name, p.box)
                if value.shape != p.shape:
                    raise ValueError(f"{p.full_name} must have shape {tuple(p.shape)}, got {tuple(value.shape)}")
                filled[p] = nn.Parameter(value.to(device=device, dtype=dtype), requires_grad=p.requires_grad)
                filled[p].__dict__.update(p.__dict__)
            sub._parameters[name] = filled[p]
    return module


def build(config: ModelConfig, seed: int = 0, device="cpu", dtype=torch.float32, **kwargs) -> GPT:
    """A GPT with initial weights: shapes on the meta device, then fill() with keyed_init. kwargs go to GPT."""
    with torch.device("meta"):
        model = GPT(config, **kwargs)
    return fill(model, lambda name, box: keyed_init(name, box, seed, config), device, dtype)


# ---- counting --------------------------------------------------------------------------------------------------------

def num_params(config: ModelConfig) -> int:
    """Parameters, all of them, the tied weight once."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


def flops_per_token(c: ModelConfig, seq_len: int) -> int:
    """FLOPs of forward and backward for one token: 6 per matrix weight (the embedding is a look-up, the head a
    product), plus 12 n_layer H D T for attention: q k^T and p v take 2 H D T each, and backward twice that again. All T
    keys are counted, as in PaLM's MFU (arXiv:2204.02311, appendix B); a causal kernel can skip half of that term."""
    projections = 2 * c.n_embd * c.head_dim * (c.n_head + c.n_kv_head)                         # q and o, k and v
    mlp = (3 if c.mlp == "swiglu" else 2) * c.n_embd * c.n_ff
    attention = 12 * c.n_layer * c.n_head * c.head_dim * seq_len
    return 6 * (c.n_layer * (projections + mlp) + c.vocab_size * c.n_embd) + attention


# ---- the same loss, other weights: SFT, DPO, reinforcement learning --------------------------------------------------
#
# Every stage of training follows the gradient of sum_t w_t nll_t / N. w_t is a weight of token t, a constant for
# backward. Only w and N differ, so one code trains them all on many ranks (parallel.py, zero.py):
#
#     pretrain   w = 1                                                                             N = targets
#     sft        w = 1 on the answer; a prompt has no targets                                      N = targets
#     dpo        w = beta sigmoid(-margin) on the chosen answer, minus that on the rejected one    N = pairs
#     rl         w = advantage - kl_coef x the sum of log p/p_start from this token on             N = answers

def dpo_loss(log_ratio_chosen, log_ratio_rejected, beta):
    """DPO as on the board (eq. 7). log_ratio (pairs,): log p/p_start of each answer, with its gradient."""
    return -F.logsigmoid(beta * (log_ratio_chosen - log_ratio_rejected)).mean()


def reinforce_loss(log_p, advantage):
    """The policy gradient as on the board. log_p (answers,): log-probability of each answer, with its gradient."""
    return -(advantage * log_p).mean()


# The same two gradients as weights of tokens, dpo_loss in preference, reinforce_loss in policy_gradient. Each takes
# (batch, nll (B, T) from a pass without gradient, a coefficient) and returns the weights (B, T) and a tensor of three
# sums over the batch: loss, pairs ranked right, margin; or loss, reward, log p/p_start.

def preference(batch, nll, beta: float):
    """DPO (Rafailov 2023, arXiv:2305.18290, eq. 7). Rows 2u and 2u + 1 hold the chosen and the rejected answers to the
    same prompts. documents (B, T): the number, from 1, of the answer that a token belongs to. reference (B, documents):
    column d is the nll of answer d under the starting model; column 0 is empty."""
    answer, documents = batch["targets"] >= 0, batch["documents"]
    zeros = torch.zeros_like(batch["reference"])

    def per_answer(x):                                          # sums of an answer's tokens: (B, T) -> (B, documents)
        return zeros.scatter_add(1, documents, (x * answer).to(zeros.dtype))

    # margin = beta (log p/p_start (chosen) - log p/p_start (rejected))                        (B/2, documents)
    log_ratio = batch["reference"] - per_answer(nll)
    margin = beta * (log_ratio[0::2] - log_ratio[1::2])
    # loss = -log sigmoid(margin), whose derivative by a chosen token's nll is beta sigmoid(-margin)
    w = beta * torch.sigmoid(-margin)
    of_answer = torch.stack((w, -w), dim=1).flatten(0, 1)      # (B, documents): row 2u has w, row 2u + 1 has -w
    weights = of_answer.gather(1, documents) * answer          # to the answer's tokens: (B, T)
    is_pair = per_answer(torch.ones_like(nll))[0::2] > 0       # False in column 0 and for padding: no targets there
    sums = [x[is_pair].double().sum() for x in (F.softplus(-margin), margin > 0, margin)]
    return weights.to(nll.dtype), torch.stack(sums)


def policy_gradient(batch, nll, kl_coef: float):
    """REINFORCE (Williams 1992). A row is one answer. reward, advantage (B,): GRPO's advantage (arXiv:2402.03300) is
    the reward minus a baseline, divided by a spread. reference (B, T): nll under the starting model. The sum of
    log p - log p_start over an answer is, on average, KL(p, p_start). A token has an effect only on the terms from
    itself on: its weight is charged for these, and not for the terms before it."""
    answer = batch["targets"] >= 0
    log_ratio = (batch["reference"] - nll) * answer
    to_come = log_ratio.flip(1).cumsum(1).flip(1)                              # to_come[t] = sum_{s >= t} log_ratio[s]
    weights = (batch["advantage"][:, None] - kl_coef * to_come).to(nll.dtype) * answer
    return weights, torch.stack([x.double().sum() for x in (weights * nll, batch["reward"], log_ratio)])


@torch.no_grad()
def nll_of(gpt, batch) -> torch.Tensor:
    """nats of each target (B, T) of a batch under a model, on the model's device; 0 where there is no target."""
    device = next(gpt.parameters()).device
    return gpt(batch["tokens"].to(device), batch["targets"].to(device))[1]


# ---- the lecture ends here -------------------------------------------------------------------------------------------
#
# What follows is for looking things up.

# ---- Hugging Face folders --------------------------------------------------------------------------------------------

# family -> {our field: theirs}
HF_FIELDS = {"llama": {
    "vocab_size": "vocab_size", "seq_len": "max_position_embeddings", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "head_dim": "head_dim",
    "n_embd": "hidden_size", "n_ff": "intermediate_size", "bias": "attention_bias",
    "tie_embeddings": "tie_word_embeddings", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps"}}
HF_FIELDS["qwen3"] = HF_FIELDS["llama"]
HF_FIELDS["gpt2"] = {
    "vocab_size": "vocab_size", "seq_len": "n_positions", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
    "n_ff": "n_inner", "tie_embeddings": "tie_word_embeddings", "norm_eps": "layer_norm_epsilon"}
# fields of a config.json that change the function: those that must be absent or 0, and those that must be absent or 1
ABSENT = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size", "final_logit_softcapping",
          "attn_logit_softcapping", "attention_multiplier", "query_pre_attn_scalar", "scale_attn_by_inverse_layer_idx",
          "add_cross_attention", "quantization_config")
ONE = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "scale_attn_weights")


def require(name: str, value, *allowed):
    """Absent is None. An error names the last of the allowed values."""
    if value not in allowed:
        raise ValueError(f"{name} must be {allowed[-1]}, got {value!r}")


def config_from_hf(hf: dict) -> ModelConfig:
    """A config.json of Llama, Qwen3 or GPT-2 (as a dict) -> ModelConfig.

    Raises ValueError, one line with field and value, for an architecture that is not exactly one of these: attention
    windows, scaled or partial rotary angles, experts, other activations, multipliers, biases in some places only.
    """
    kind, get = hf.get("model_type"), hf.get
    if kind not in HF_FIELDS:
        why = " (its biases are on q, k and v alone)" if kind == "qwen2" else ""
        raise ValueError(f"model_type must be one of {', '.join(HF_FIELDS)}, got {kind!r}{why}")
    for name in ABSENT:
        require(name, get(name), None, 0, "absent")
    for name in ONE:
        require(name, get(name), None, 1)
    if get("use_sliding_window", True):
        require("sliding_window", get("sliding_window"), None, 0, "absent")
    for layer_type in get("layer_types") or ():
        require("layer_types", layer_type, "full_attention")
    # rotary angles stand under three names
    rope = {"rope_theta": get("rope_theta") or 10000.0} | (get("rope_scaling") or {}) | (get("rope_parameters") or {})
    require("rope_type", rope.pop("rope_type", rope.pop("type", None)), None, "default")
    require("partial_rotary_factor", rope.pop("partial_rotary_factor", get("partial_rotary_factor")), None, 1)
    for name in rope:
        require("rope_parameters", name, "rope_theta", "rope_theta alone")
    names = HF_FIELDS[kind]
    C, H = (get(names[ours], 1) for ours in ("n_embd", "n_head"))
    if kind == "gpt2":
        require("activation_function", get("activation_function"), None, "gelu_pytorch_tanh", "gelu_new")
        common = dict(norm="layernorm", position="learned", mlp="gelu", bias=True, n_kv_head=H, head_dim=C // H)
        default = {"n_inner": 4 * C, "tie_word_embeddings": True}
    else:
        require("hidden_act", get("hidden_act"), None, "swish", "silu")
        require("mlp_bias", get("mlp_bias", False), get("attention_bias") or False)
        common = {"qk_norm": kind == "qwen3"}
        default = {"num_key_value_heads": H, "attention_bias": False, "tie_word_embeddings": False}
        if kind == "llama":
            default["head_dim"] = C // H
        else:
            require("attention_bias", get("attention_bias"), None, False)
    given = default | {name: value for name, value in hf.items() if value is not None} | rope
    for name in names.values():
        if name not in given:
            raise ValueError(f"config.json must hold {name}, it does not")
    return ModelConfig(**common, **{ours: given[theirs] for ours, theirs in names.items()})


def config_to_hf(c: ModelConfig, **token_ids) -> dict:
    """The config.json of this model, as a dict. token_ids: bos_token_id, eos_token_id, pad_token_id, each int or None.

    The family follows from the norms: LayerNorm is GPT-2's; RMSNorm with QK-norm is Qwen3's, without it Llama's.
    Raises ValueError, one line with the fields, where the family has no such model.
    """
    kind = "gpt2" if c.norm == "layernorm" else "qwen3" if c.qk_norm else "llama"
    needed = {"gpt2": dict(position="learned", mlp="gelu", bias=True, qk_norm=False, n_kv_head=c.n_head,
                           n_embd=c.n_head * c.head_dim),
              "qwen3": dict(position="rope", mlp="swiglu", bias=False),
              "llama": dict(position="rope", mlp="swiglu", n_embd=max(c.n_embd // c.n_head, 1) * c.n_head)}[kind]
    wrong = [f"{name} {value!r} (not {getattr(c, name)!r})" for name, value in needed.items()
             if getattr(c, name) != value]
    if wrong:
        raise ValueError(f"a Hugging Face {kind} with {c.norm}{' and qk_norm' * c.qk_norm} needs {', '.join(wrong)}")
    hf = {"model_type": kind, "torch_dtype": "float32", "bos_token_id": None, "eos_token_id": None,
          "pad_token_id": None} | token_ids | {theirs: getattr(c, ours) for ours, theirs in HF_FIELDS[kind].items()}
    if kind == "gpt2":
        return hf | {"architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "resid_pdrop": 0.0,
                     "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    hf |= {"mlp_bias": c.bias} if kind == "llama" else {"use_sliding_window": False}
    return hf | {"architectures": [f"{kind.capitalize()}ForCausalLM"], "hidden_act": "silu"}


# ours -> (theirs, which third of the columns): GPT-2 keeps (in, out) matrices, and q, k, v side by side
GPT2_NAMES = {
    "embed_tokens": ("wte", None), "embed_positions": ("wpe", None), "norm": ("ln_f", None),
    "input_layernorm": ("ln_1", None), "self_attn.q_proj": ("attn.c_attn", 0), "self_attn.k_proj": ("attn.c_attn", 1),
    "self_attn.v_proj": ("attn.c_attn", 2), "self_attn.o_proj": ("attn.c_proj", None),
    "post_attention_layernorm": ("ln_2", None), "mlp.up_proj": ("mlp.c_fc", None),
    "mlp.down_proj": ("mlp.c_proj", None)}


def hf_name(full_name: str, config: ModelConfig):
    """(their name, which third of its columns or None, whether it is transposed). Llama and Qwen3 have our names."""
    if config.norm == "rmsnorm" or full_name == "lm_head.weight":
        return full_name, None, False
    layer, part, suffix = re.fullmatch(r"model\.(?:layers\.(\d+)\.)?(.+)\.(\w+)", full_name).groups()
    theirs, third = GPT2_NAMES[part]
    return (f"transformer.{f'h.{layer}.' if layer else ''}{theirs}.{suffix}", third,
            part.endswith("_proj") and suffix == "weight")


def hf_reader(get, config: ModelConfig):
    """get(their name) -> tensor becomes read(full_name, box) for fill(). Where get gives memory-mapped tensors, only
    the slice is read from disk; what comes back is the reader's own memory."""
    def read(full_name, box):
        theirs, third, transposed = hf_name(full_name, config)
        t = get(theirs)                                                    # GPT-2's matrices: (in, out)
        t = t if third is None else t.chunk(3, dim=-1)[third]
        t = t.T if transposed else t
        return t[tuple(slice(start, stop) for start, stop, _ in box)].clone(memory_format=torch.contiguous_format)
    return read


def hf_tensors(config: ModelConfig, read):
    """The inverse: yields (their name, float32 tensor), one at a time, from read(full_name) -> the whole tensor. A tied
    head is left out, as their folders do."""
    with torch.device("meta"):
        names = [name for name, _ in GPT(config).named_parameters()]
    for name in names:
        theirs, third, transposed = hf_name(name, config)
        if third in (1, 2):                                                # k and v went with q
            continue
        parts = [name] if third is None else [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
        tensors = [read(part).float() for part in parts]
        yield theirs, torch.cat([t.T if transposed else t for t in tensors], dim=-1).contiguous()


# ---- demo ------------------------------------------------------------------------------------------------------------

def demo():
    """The claims of this file, measured | predicted, asserted. CPU, a few seconds."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def row(what, measured, predicted, tolerance=0.0):
        error = abs(measured - predicted) / (abs(predicted) or 1)
        print(f"{what:<58} {measured:>14,.6g} | {predicted:>14,.6g} | {error:.1e}")
        assert error <= tolerance, what

    shape = dict(vocab_size=2048, seq_len=128, n_layer=4, n_head=4, n_kv_head=2, head_dim=32, n_embd=128, n_ff=352)
    settings = {"llama": ModelConfig(**shape),
                "gpt2": ModelConfig(**shape | {"n_kv_head": 4, "n_ff": 512}, norm="layernorm", position="learned",
                                    mlp="gelu", bias=True, tie_embeddings=True)}
    tokens, targets = torch.randint(0, 2048, (2, 4, 128), generator=torch.Generator().manual_seed(0))
    for name, config in settings.items():
        print(f"{name + ', 4 layers of 128':<58} {'measured':>14} | {'predicted':>14} | rel. error")
        model = build(config)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss, _ = model(tokens, targets)
            loss.backward()
        row("FLOPs per token, forward and backward", counter.get_total_flops() / tokens.numel(),
            flops_per_token(config, 128))
        row("loss of the untrained model, nats per token | log V", loss.item() / tokens.numel(), math.log(2048), 0.01)
        prompt = tokens[:2, :5]
        cached, plain = (model.generate(prompt, 150, seed=1, use_cache=use) for use in (True, False))
        row("sampled tokens that differ with and without the cache", int((cached != plain).sum()), 0)
        print()

    assert math.floor(math.log(2048) * 10) == 76 and round(4096 * 50304 * 4 / 1e6) == 824      # the docstring's numbers
    config = settings["llama"]
    whole = keyed_init("model.embed_tokens.weight", ((0, 2048, 2048), (0, 128, 128)), 0, config)
    part = keyed_init("model.embed_tokens.weight", ((700, 900, 2048), (64, 96, 128)), 0, config)
    row("keyed_init: elements of a slice that differ from the whole", int((part != whole[700:900, 64:96]).sum()), 0)
    x, w = torch.randn(512, 128, requires_grad=True), whole.requires_grad_()
    loss, _ = chunked_cross_entropy(x, w, targets.flatten(), rows=64)
    plain_loss, _, plain_dw = plain_cross_entropy(x, w, targets.flatten(), torch.ones(512))
    row("loss: a few rows at a time | as on the board", loss.item(), plain_loss.item(), 1e-6)
    dw, = torch.autograd.grad(loss, w)
    row("largest difference of dW", (dw - plain_dw).abs().max().item() / plain_dw.abs().max().item(), 0, 1e-5)


if __name__ == "__main__":
    demo()
