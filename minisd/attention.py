"""Attention, feed-forward and transformer blocks. All attention in the package goes through `attend`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Compute multi-head scaled dot-product attention, softmax(q kᵀ / √d) v per head.

    q (n, queries, heads·d), k and v (n, keys, heads·d) -> (n, queries, heads·d).
    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.
    """
    q, k, v = (rearrange(x, "n tokens (heads d) -> n heads tokens d", heads=heads) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return rearrange(out, "n heads tokens d -> n tokens (heads d)")


class Attention(nn.Module):
    """Self-attention, or cross-attention if a context is given. Parameter names follow diffusers.

    x (n, queries, query_dim), context (n, keys, context_dim) -> (n, queries, query_dim).
    With `upcast`, attention over half-precision inputs is computed in float32, as scores overflow float16 in SD 2.1.
    """

    def __init__(
        self, query_dim: int, heads: int, context_dim: int | None = None, bias: bool = False, upcast: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.upcast = heads, upcast
        self.to_q = nn.Linear(query_dim, query_dim, bias=bias)
        self.to_k = nn.Linear(context_dim or query_dim, query_dim, bias=bias)
        self.to_v = nn.Linear(context_dim or query_dim, query_dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(query_dim, query_dim)])  # a list to match checkpoint keys (to_out.0)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        if self.upcast and q.dtype in (torch.float16, torch.bfloat16):
            q, k, v = q.float(), k.float(), v.float()
        return self.to_out[0](attend(q, k, v, self.heads).to(x.dtype))


class GEGLU(nn.Module):
    """Gated linear unit with GELU: a · gelu(gate), where a and gate are the two halves of a linear projection.

    x (n, tokens, dim) -> (n, tokens, hidden). Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        a, gate = self.proj(x).chunk(2, dim=-1)
        return a * F.gelu(gate)


class FeedForward(nn.Module):
    """Position-wise MLP with a 4× wider GEGLU hidden layer. x (n, tokens, dim) -> (n, tokens, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))  # keeps key net.2

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text embeddings and MLP, each pre-norm with a residual connection.

    x (n, pixels, dim), context (n, tokens, context_dim) -> (n, pixels, dim).
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
    """Transformer block over the pixels of a feature map, with input and output projections and a residual connection.

    x (n, channels, h, w), context (n, tokens, context_dim) -> (n, channels, h, w). The projections are linear layers
    if `linear` (Stable Diffusion 2), and the equivalent 1×1 convolutions otherwise (Stable Diffusion 1).
    Source: Rombach et al. 2022, appendix E.2.1; the MLP comes last, as in the released code.
    """

    def __init__(
        self, channels: int, heads: int, context_dim: int, groups: int, linear: bool = False, upcast: bool = False
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # as in the original code; ResBlocks use norm_eps, 1e-5
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, context_dim, upcast)])
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        residual, height = x, x.shape[-2]
        x = self.norm(x)
        x = x if self.linear else self.proj_in(x)
        x = rearrange(x, "n c h w -> n (h w) c")
        x = self.proj_in(x) if self.linear else x
        x = self.transformer_blocks[0](x, context)
        x = self.proj_out(x) if self.linear else x
        x = rearrange(x, "n (h w) c -> n c h w", h=height)
        return residual + (x if self.linear else self.proj_out(x))
