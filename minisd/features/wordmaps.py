"""Where each word of a prompt was looked for: cross-attention, averaged while a picture is drawn.

Source: Tang et al. 2022, "What the DAAM: Interpreting Stable Diffusion Using Cross Attention", section 3; here a mean
over layers, heads and calls takes the place of their sum.
"""

from __future__ import annotations

import string
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from minisd.attention import watch_attention
from minisd.features.prompts import ROOM, parse, read
from minisd.tokenizer import BOS, END_OF_WORD, EOS, Tokenizer


class Word(NamedTuple):
    """A word of a prompt, and the rows of the context, (77·k, width), that its tokens have."""

    text: str
    rows: tuple[int, ...]


def split(prompt: str, tokenizer: Tokenizer) -> list[Word]:
    """The words of a prompt in their order, as the tokenizer cuts and spells them; marks alone are none.

    Brackets and their weights are not part of any word. Raises ValueError for what `prompts.read` refuses.
    """
    chunks = read(prompt, tokenizer)
    rows = [(ROOM + 2) * c + 1 + i for c, chunk in enumerate(chunks) for i in range(len(chunk))]
    tokens = [token for text, _ in parse(prompt) for token in tokenizer.tokenize(text)]
    whole = {BOS, EOS, tokenizer.pad_token, *tokenizer.added}
    words, ids, places = [], [], []
    for token, row in zip(tokens, rows, strict=True):
        ids.append(tokenizer.vocabulary[token])
        places.append(row)
        if token.endswith(END_OF_WORD) or token in whole:
            words.append(Word(tokenizer.decode(ids), tuple(places)))
            ids, places = [], []
    return [word for word in words if word.text.strip(string.punctuation)]


class WordMaps:
    """The mean cross-attention of one picture, over the layers, their heads, and the calls of the UNet.

    height, width: of the latents. rows: of the prompt's context, 77·k. What is kept does not grow with the calls: a sum
    for each size of the feature maps. The picture's bits stay what they are (see `watch_attention`).
    """

    def __init__(self, unet: nn.Module, height: int, width: int, rows: int) -> None:
        self.size, self.rows = (height, width), rows
        self._layers = [layer for name, layer in unet.named_modules() if name.endswith(".attn2")]
        self._sums: dict[tuple[int, int], Tensor] = {}
        self.layers, self.heads, self.count = len(self._layers), 0, 0

    def watch(self) -> AbstractContextManager[None]:
        """Within this block, whatever the UNet is asked by this thread counts, for the last prompt of the batch."""
        return watch_attention(dict.fromkeys(self._layers, self._add))

    def _add(self, weights: Tensor) -> None:
        _, self.heads, queries, keys = weights.shape
        height, width = self._shape(queries)
        # a context may have been repeated to the length of the negative prompt's; a row then has the sum of its copies
        seen = reduce(
            weights[-1], "heads (h w) (copies rows) -> rows h w", "sum", h=height, w=width, rows=min(self.rows, keys)
        )
        self._sums[height, width] = self._sums.get((height, width), 0) + seen / self.heads
        self.count += 1

    def _shape(self, queries: int) -> tuple[int, int]:
        height, width = self.size
        while height * width > queries:
            height, width = (height + 1) // 2, (width + 1) // 2
        return height, width

    def of(self, word: Word) -> Tensor:
        """The share of each latent pixel's attention that the word got, all of its tokens together, (h/8, w/8).

        The shares of all rows of the context sum to 1 at every pixel. Coarser maps are spread over the pixels that each
        of their cells covers. Raises ValueError while nothing has been watched.
        """
        if not self.count:
            raise ValueError("no call of the UNet has been watched; draw within `watch()` first")
        rows = torch.tensor(word.rows)
        total = torch.zeros(self.size)
        for sums in self._sums.values():
            chosen = reduce(sums[rows.to(sums.device)].float().cpu(), "rows h w -> h w", "sum")
            total += rearrange(F.interpolate(chosen[None, None], size=self.size), "1 1 h w -> h w")
        return total / self.count
