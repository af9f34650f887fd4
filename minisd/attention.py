"""Attention: the one place where it is written. Text, pixels, and pixels asking words all come through `attend`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


class AttentionRecord(NamedTuple):
    """The weights that one attention layer computed in one call: `weights` (n, heads, queries, keys), rows sum to 1."""

    name: str
    weights: Tensor


Kept = dict[nn.Module, tuple[Tensor, Tensor, Tensor]]
Watch = Callable[[Tensor], None]

_recorder: ContextVar[Callable[[nn.Module, Tensor], None] | None] = ContextVar("recorder", default=None)
_kept: ContextVar[Kept | None] = ContextVar("kept", default=None)
_watched: ContextVar[Mapping[nn.Module, Watch]] = ContextVar("watched", default=MappingProxyType({}))


@contextmanager
def record_attention(model: nn.Module) -> Iterator[list[AttentionRecord]]:
    """Within this block, collect the weights of every attention layer of `model`, in the order of the calls.

    The explicit softmax takes the place of the fused kernel, so results agree with it to rounding. Only calls made by
    the same thread are recorded. Blocks nest. Each record holds the layer's name, such as `down_blocks.0.attentions.0.
    transformer_blocks.0.attn2`, and float32 weights of shape (n, heads, queries, keys).
    """
    names = {module: name for name, module in model.named_modules()}
    records: list[AttentionRecord] = []
    outer = _recorder.get()
    compiled = any(module._compiled_call_impl is not None for module in model.modules())

    def record(layer: nn.Module, weights: Tensor) -> None:
        if layer in names:
            records.append(AttentionRecord(names[layer], weights.detach().float()))
        if outer is not None:
            outer(layer, weights)

    token = _recorder.set(record)
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield records
    finally:
        _recorder.reset(token)


@contextmanager
def keep_projections(kept: Kept) -> Iterator[None]:
    """Within this block cross-attention looks into `kept` for the keys and values of its context, and puts them there.

    The words stay the same while a picture is drawn, so a run that brings the same tensor of context to every call
    projects it once. `kept`, {} at first, holds for each layer the context, keys and values; another tensor of context
    takes their place. It holds for calls made by the same thread, while weights stay what they are, and not in compiled
    code, which knows no memory.
    """
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)


@contextmanager
def watch_attention(layers: Mapping[nn.Module, Watch]) -> Iterator[None]:
    """Within this block, hand the weights of each of these layers to its function, once a call.

    They are those of `record_attention`, float32 (n, heads, queries, keys). But here the fused kernel still gives the
    answer, so that results stay what they are to the last bit, nothing is kept, and no other layer's weights are
    computed. Only calls made by the same thread are watched, and of a compiled model none. Of blocks that nest, the
    inner one watches.
    """
    token = _watched.set(layers)
    try:
        yield
    finally:
        _watched.reset(token)


def attention_weights(q: Tensor, k: Tensor, causal: bool = False) -> Tensor:
    """Return softmax(q kᵀ / √d), the share of each key in each query's answer; computed in float32 or wider.

    q (n, heads, queries, d), k (n, heads, keys, d) -> (n, heads, queries, keys). With `causal`, query i sees keys 0…i.
    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1.
    """
    if q.dtype in HALF:
        q, k = q.float(), k.float()
    scores = torch.einsum("nhqd,nhkd->nhqk", q, k) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(dim=-1)


def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Split into heads, let every query take the mean of the values weighted by softmax(q kᵀ / √d), and join the heads.

    q (n, queries, heads·d), k and v (n, keys, heads·d) -> (n, queries, heads·d). `layer` is the module that asks, so
    that `record_attention` can name it.
    """
    q, k, v = (rearrange(x, "n tokens (heads d) -> n heads tokens d", heads=heads) for x in (q, k, v))
    compiling = torch.compiler.is_compiling()
    record = None if compiling else _recorder.get()
    watch = None if compiling else _watched.get().get(layer)
    if watch is not None:
        watch(attention_weights(q, k, causal).detach().float())
    # in mixed precision torch's fused attention on a CPU walks back four times as slowly as these two products
    slow = not compiling and q.requires_grad and q.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if record is None and not slow:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    else:
        weights = attention_weights(q, k, causal)
        if record is not None:
            record(layer, weights)
        mixed = weights.to(v.dtype) @ v
    return rearrange(mixed, "n heads tokens d -> n tokens (heads d)")


class Attention(nn.Module):
    """Multi-head attention with diffusers' names: self-attention, or cross-attention when a context is given.

    x (n, queries, query_dim), context (n, keys, context_dim) -> (n, queries, query_dim). `upcast` computes the scores
    of half-precision inputs in float32, which Stable Diffusion 2.1 needs.
    """

    def __init__(
        self, query_dim: int, heads: int, context_dim: int | None = None, bias: bool = False, upcast: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.upcast = heads, upcast
        self.to_q = nn.Linear(query_dim, query_dim, bias=bias)
        self.to_k = nn.Linear(context_dim or query_dim, query_dim, bias=bias)
        self.to_v = nn.Linear(context_dim or query_dim, query_dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(query_dim, query_dim)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q = self.to_q(x)
        k, v = (self.to_k(x), self.to_v(x)) if context is None else self._keys_values(context)
        if self.upcast and q.dtype in HALF:
            q, k, v = q.float(), k.float(), v.float()
        return self.to_out[0](attend(self, q, k, v, self.heads).to(x.dtype))

    def _keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        kept = None if torch.compiler.is_compiling() else _kept.get()
        if kept is None:
            return self.to_k(context), self.to_v(context)
        if self not in kept or kept[self][0] is not context:
            kept[self] = context, self.to_k(context), self.to_v(context)
        return kept[self][1:]


class GEGLU(nn.Module):
    """A gated linear layer: a · gelu(g), where a and g are the halves of one projection, with the exact GELU.

    x (n, tokens, dim) -> (n, tokens, hidden). Source: Shazeer 2020, "GLU Variants Improve Transformer", section 2.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        a, gate = self.proj(x).chunk(2, dim=-1)
        return a * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back. x (n, tokens, dim) -> (n, tokens, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pixels look at each other, then at the words, then each thinks for itself; every step is added to its input.

    x (n, pixels, dim), context (n, words, context_dim) -> (n, pixels, dim).
    """

    def __init__(self, dim: int, heads: int, context_dim: int, upcast: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, upcast=upcast)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim, upcast=upcast)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map, with projections in and out and a residual around it all.

    x (n, channels, h, w), context (n, words, context_dim) -> (n, channels, h, w). `linear` puts the projections on the
    token side (Stable Diffusion 2) in place of 1×1 convolutions (Stable Diffusion 1).
    Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", appendix E.2.1.
    """

    def __init__(
        self, channels: int, heads: int, context_dim: int, groups: int, linear: bool = False, upcast: bool = False
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, context_dim, upcast)])
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height = x.shape[-2]
        tokens = self.norm(x) if self.linear else self.proj_in(self.norm(x))
        tokens = rearrange(tokens, "n c h w -> n (h w) c")
        tokens = self.proj_in(tokens) if self.linear else tokens
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        tokens = self.proj_out(tokens) if self.linear else tokens
        out = rearrange(tokens, "n (h w) c -> n c h w", h=height)
        return x + (out if self.linear else self.proj_out(out))
