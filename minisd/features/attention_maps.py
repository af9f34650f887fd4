"""Attention maps, recorded with forward hooks.

Recording does not change the output of a network. Only calls from the thread that entered the context manager are
recorded.
"""

from __future__ import annotations

import string
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from minisd.features.prompts import BREAK, TOKENS_PER_CHUNK, parse, read
from minisd.text_encoder import CausalSelfAttention
from minisd.tokenizer import BOS, END_OF_WORD, EOS, Tokenizer

Callback = Callable[[Tensor], None]


class AttentionRecord(NamedTuple):
    """Attention weights (n, heads, queries, keys) of one layer in one call; each row sums to 1."""

    name: str
    weights: Tensor


def attention_weights(q: Tensor, k: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Compute softmax(q kᵀ / √d) for each head, in at least float32.

    Shapes: q (n, queries, heads·d), k (n, keys, heads·d) -> (n, heads, queries, keys). With `causal`, query i attends
    to keys 0…i. Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = (rearrange(x.to(dtype), "n tokens (heads d) -> n heads tokens d", heads=heads) for x in (q, k))
    scores = torch.einsum("nhqd,nhkd->nhqk", q, k) * q.shape[-1] ** -0.5
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return scores.softmax(dim=-1)


@contextmanager
def watch_attention(layers: Mapping[nn.Module, Callback]) -> Iterator[None]:
    """Pass the attention weights of each layer, float32 (n, heads, queries, keys), to its callback on every call.

    The hooks are on the query and key projections. Inside the context, compiled models run in eager mode.
    """
    thread = threading.get_ident()
    handles = []
    for layer, callback in layers.items():
        handles += _watch(layer, callback, thread)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(layer: Any, callback: Callback, thread: int) -> list[Any]:
    causal = isinstance(layer, CausalSelfAttention)
    to_q, to_k = (layer.q_proj, layer.k_proj) if causal else (layer.to_q, layer.to_k)
    queries: list[Tensor] = []

    def keep_queries(module: nn.Module, inputs: tuple[Tensor, ...], q: Tensor) -> None:
        if threading.get_ident() == thread:
            queries[:] = [q]

    def report(module: nn.Module, inputs: tuple[Tensor, ...], k: Tensor) -> None:
        if threading.get_ident() == thread and queries:
            weights = attention_weights(queries.pop(), k, layer.heads, causal)
            callback(weights.detach().float())

    return [to_q.register_forward_hook(keep_queries), to_k.register_forward_hook(report)]


@contextmanager
def record_attention(model: nn.Module) -> Iterator[list[AttentionRecord]]:
    """Record the weights of all attention layers of a model, in execution order.

    Each record holds a layer name, such as `down_blocks.0.attentions.0.transformer_blocks.0.attn2`, and float32
    weights (n, heads, queries, keys). Contexts can be nested.
    """
    records: list[AttentionRecord] = []

    def recorder(name: str) -> Callback:
        return lambda weights: records.append(AttentionRecord(name, weights))

    layers = {layer: recorder(name) for name, layer in model.named_modules() if is_attention(layer)}
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), watch_attention(layers):
        yield records


def is_attention(layer: nn.Module) -> bool:
    """Return whether a module is an attention layer of the UNet, autoencoder or text encoder."""
    return hasattr(layer, "to_k") or isinstance(layer, CausalSelfAttention)


class Word(NamedTuple):
    """A word of a prompt, and the indices of its tokens in the text embeddings (77·k, width)."""

    text: str
    rows: tuple[int, ...]


def split_words(prompt: str, tokenizer: Tokenizer) -> list[Word]:
    """Split a prompt into words as normalized by the tokenizer, without punctuation, brackets and weights.

    Raises ValueError for an invalid prompt, like `prompts.read`.
    """
    chunks = read(prompt, tokenizer)
    rows = [(TOKENS_PER_CHUNK + 2) * c + 1 + i for c, chunk in enumerate(chunks) for i in range(len(chunk))]
    tokens = [token for text, _ in parse(prompt) for token in tokenizer.tokenize(BREAK.sub(" ", text))]
    complete = {BOS, EOS, tokenizer.pad_token, *tokenizer.added}
    words, ids, word_rows = [], [], []
    for token, row in zip(tokens, rows, strict=True):
        ids.append(tokenizer.vocabulary[token])
        word_rows.append(row)
        if token.endswith(END_OF_WORD) or token in complete:
            words.append(Word(tokenizer.decode(ids), tuple(word_rows)))
            ids, word_rows = [], []
    return [word for word in words if word.text.strip(string.punctuation)]


class WordMaps:
    """Cross-attention maps of one image, averaged over layers, heads and UNet calls.

    Memory use is constant: one running sum per feature-map resolution.
    Source: Tang et al. 2022, "What the DAAM: Interpreting Stable Diffusion Using Cross Attention", section 3, with the
    mean instead of the sum over layers, heads and calls.

    Args:
        height, width: The size of the latents.
        rows: The number of rows of the prompt's text embeddings, 77·k.
    """

    def __init__(self, unet: nn.Module, height: int, width: int, rows: int) -> None:
        self.size, self.rows = (height, width), rows
        self._layers = [layer for name, layer in unet.named_modules() if name.endswith(".attn2")]
        self._sums: dict[tuple[int, int], Tensor] = {}
        self.layers, self.heads, self.count = len(self._layers), 0, 0

    def watch(self) -> Any:
        """Return a context manager that records this thread's UNet calls, for the last prompt of the batch."""
        return watch_attention(dict.fromkeys(self._layers, self._add))

    def _add(self, weights: Tensor) -> None:
        _, self.heads, queries, keys = weights.shape
        height, width = self.size
        while height * width > queries:
            height, width = (height + 1) // 2, (width + 1) // 2
        # the context may be repeated to the length of the negative prompt's; sum over the copies of each row
        maps = reduce(
            weights[-1], "heads (h w) (copies rows) -> rows h w", "sum", h=height, w=width, rows=min(self.rows, keys)
        )
        self._sums[height, width] = self._sums.get((height, width), 0) + maps / self.heads
        self.count += 1

    def of(self, word: Word) -> Tensor:
        """Return the attention of each latent pixel to a word, summed over its tokens, (h/8, w/8).

        At every pixel, the attention to all rows of the context sums to 1. Coarser maps are upsampled with
        nearest-neighbor interpolation. Raises ValueError if no UNet call has been recorded.
        """
        if not self.count:
            raise ValueError("no UNet call has been recorded; draw inside `with maps.watch():` first")
        rows = torch.tensor(word.rows)
        total = torch.zeros(self.size)
        for sums in self._sums.values():
            word_map = reduce(sums[rows.to(sums.device)].float().cpu(), "rows h w -> h w", "sum")
            total += rearrange(F.interpolate(word_map[None, None], size=self.size), "1 1 h w -> h w")
        return total / self.count
