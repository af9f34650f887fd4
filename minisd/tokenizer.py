"""CLIP's byte-pair encoding: a prompt becomes 77 token ids.

The text is normalised and split into words; each word is spelled in symbols that stand for its UTF-8 bytes; then
neighbouring symbols are merged, always the pair that ranks first in a list of merges learned from captions. The merges
determine the vocabulary: 256 byte symbols, the same at the end of a word, one token per merge, start and end.
Sources: Sennrich et al. 2016 (arXiv 1508.07909); Radford et al. 2021 (arXiv 2103.00020), whose merges are shipped (MIT,
assets/licenses/CLIP-MIT.txt): lines 2 to 48,895 of bpe_simple_vocab_16e6.txt in the PyPI package clip-anytorch.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from itertools import pairwise

import torch

BOS, EOS, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"
# Unicode's White_Space property; Python's own `\s` adds \x1c to \x1f.
WHITE_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
# A word, in the alphabet of `_kind`: an English contraction, a run of letters, one digit, a run of anything else.
WORD = re.compile(r"'(?:[stmd]|re|ve|ll)|[a-zL]+|N|[^a-zLN ]+")


def byte_symbols() -> list[str]:
    """The 256 printable characters that stand for the bytes 0 to 255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def normalize(text: str) -> str:
    """Unicode NFC, single spaces, lower case."""
    folded = WHITE_SPACE.sub(" ", unicodedata.normalize("NFC", text))
    return "".join(character.lower() for character in folded)  # "Σ".lower() depends on its neighbours


def _kind(character: str) -> str:
    """L for a letter, N for a number, P for the rest; a to z, apostrophe and space stand for themselves."""
    if character in string.ascii_lowercase + "' ":
        return character
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "P"


def split_words(text: str) -> list[str]:
    """Cut normalised text into words, inside which symbols are merged."""
    return [text[slice(*match.span())] for match in WORD.finditer("".join(map(_kind, text)))]


class Tokenizer:
    """Text to token ids and back. A tokenizer never changes, so threads may share it.

    Args:
        vocabulary: token to id; the ids are 0, 1, 2 … without gaps.
        merges: pairs of symbols, best rank first.
        pad_token: fills up rows; the end of text in Stable Diffusion 1, "!" in Stable Diffusion 2.
        added: words that stand for tokens of their own, found before a text is split (see `textual_inversion.py`).
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        pad_token: str = EOS,
        added: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.vocabulary, self.pad_token, self.added = dict(vocabulary), pad_token, dict(added or {})
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (vocabulary[t] for t in (BOS, EOS, pad_token))
        self._symbols = byte_symbols()
        self._bytes = {symbol: byte for byte, symbol in enumerate(self._symbols)}
        self._tokens = {i: "".join(self._spell(t)) if t in self.added else t for t, i in vocabulary.items()}
        # As in transformers, the pad token counts only as typed, other special tokens in either case.
        self._pad = _finder([pad_token])
        self._special = _finder({BOS, EOS, *self.added} - {pad_token})

    @classmethod
    def from_pretrained(cls) -> Tokenizer:
        """The tokenizer of Stable Diffusion 1; `minisd.io.tokenizer_files.read_tokenizer` reads others."""
        folder = resources.files("minisd") / "assets/tiny/tokenizer"
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
        return cls(vocabulary, [(left, right) for left, right in (line.split(" ") for line in lines)])

    def merge_steps(self, word: str) -> list[list[str]]:
        """The symbols of one word, from single bytes to tokens, before the first merge and after each."""
        (word,) = split_words(normalize(word))
        return list(self._merge(word))

    def _spell(self, text: str) -> list[str]:
        return [self._symbols[byte] for byte in text.encode()]

    def _merge(self, word: str) -> Iterator[list[str]]:
        symbols = self._spell(word)
        symbols[-1] += END_OF_WORD
        yield symbols
        while pairs := set(pairwise(symbols)) & self.ranks.keys():
            symbols = _join(symbols, min(pairs, key=self.ranks.__getitem__))
            yield symbols

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text; `</w>` ends each word."""
        tokens: list[str] = []
        for part in self._pad.split(text):
            if part == self.pad_token:
                tokens.append(part)
                continue
            for piece in self._special.split(normalize(part)):
                if self._special.fullmatch(piece):
                    tokens += self.added.get(piece, (piece,))
                    continue
                for word in split_words(piece):
                    tokens += deque(self._merge(word), maxlen=1).pop()
        return tokens

    def encode(self, text: str) -> list[int]:
        """The ids of a text of any length, without start, end and padding."""
        return [self.vocabulary[token] for token in self.tokenize(text)]

    def decode(self, ids: Iterable[int] | torch.Tensor, skip_special_tokens: bool = False) -> str:
        """The text that ids stand for: lower case, a space after each word, � for invalid UTF-8."""
        skipped = {BOS, EOS, self.pad_token} if skip_special_tokens else set()
        tokens = [token for token in (self._tokens[int(i)] for i in ids) if token not in skipped]
        text = bytes(self._bytes[symbol] for symbol in "".join(tokens)).decode(errors="replace")
        return text.replace(END_OF_WORD, " ").strip()

    def __call__(self, texts: str | Sequence[str], max_length: int = 77) -> torch.Tensor:
        """Ids (n, max_length) of n texts: start, text (cut where it is too long), end, padding."""
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            row = [self.bos_token_id, *self.encode(text)[: max_length - 2], self.eos_token_id]
            rows.append(row + [self.pad_token_id] * (max_length - len(row)))
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), max_length)

    def truncated(self, text: str, max_length: int = 77) -> str:
        """The end of a text that does not fit into max_length ids, so that no model sees it."""
        return self.decode(self.encode(text)[max_length - 2 :])


def _join(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Merge a pair wherever it occurs, from left to right."""
    joined = symbols[:1]
    for symbol in symbols[1:]:
        if (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def _finder(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds tokens in a text, the longest where several begin; `split` keeps them."""
    return re.compile(f"({'|'.join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))})")
