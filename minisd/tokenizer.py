"""The CLIP tokenizer: byte-level byte-pair encoding (BPE) of prompts to 77 token ids.

Text is normalized and split into words, and each word is represented as a sequence of symbols, one per UTF-8 byte.
Adjacent symbols are then merged, highest-priority pair first, by CLIP's published list of merges. The vocabulary
follows from the merges: 256 byte symbols, 256 with an end-of-word marker, one token per merge, and two special tokens.
Sources: Sennrich et al. 2016 (arXiv 1508.07909); Radford et al. 2021 (arXiv 2103.00020), whose merges are bundled (MIT,
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
# Characters with the Unicode property White_Space; `\s` in Python also matches \x1c to \x1f.
WHITE_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
# Words: an English contraction, a run of letters, a single numeric character, or a run of other characters. `re` does
# not support \p{L} and \p{N}, so the pattern is matched against text in which `_kind` has replaced each character.
WORD = re.compile(r"'(?:[stmd]|re|ve|ll)|[a-zL]+|N|[^a-zLN ]+")


def byte_symbols() -> list[str]:
    """Return the printable characters that represent the bytes 0 to 255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def normalize(text: str) -> str:
    """Normalize text to Unicode NFC, collapse whitespace and convert to lower case."""
    folded = WHITE_SPACE.sub(" ", unicodedata.normalize("NFC", text))
    return "".join(character.lower() for character in folded)  # by character: lower() of "Σ" depends on context


def _kind(character: str) -> str:
    """Map letters to L, numbers to N and other characters to P; a to z, apostrophe and space map to themselves."""
    if character in string.ascii_lowercase + "' ":
        return character
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "P"


def split_words(text: str) -> list[str]:
    """Split normalized text into words; merges do not cross word boundaries."""
    return [text[slice(*match.span())] for match in WORD.finditer("".join(map(_kind, text)))]


class Tokenizer:
    """CLIP tokenizer. It is never modified after construction and can be shared between threads.

    Args:
        vocabulary: Mapping from tokens to ids, which are contiguous from 0.
        merges: Pairs of symbols to merge, in order of decreasing priority.
        pad_token: Padding token: EOS in Stable Diffusion 1, "!" in Stable Diffusion 2.
        added: Mapping from placeholder words to their tokens, matched before splitting (see `textual_inversion.py`).
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
        # as in transformers, the pad token is matched case-sensitively, other special tokens case-insensitively
        self._pad = _finder([pad_token])
        self._special = _finder({BOS, EOS, *self.added} - {pad_token})

    @classmethod
    def from_pretrained(cls) -> Tokenizer:
        """Load the tokenizer of Stable Diffusion 1; use `minisd.io.tokenizer_files.read_tokenizer` for others."""
        folder = resources.files("minisd") / "assets/tiny/tokenizer"
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
        return cls(vocabulary, [(left, right) for left, right in (line.split(" ") for line in lines)])

    def merge_steps(self, word: str) -> list[list[str]]:
        """Return the symbols of a word before the first merge and after each merge."""
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
        """Split text into tokens; `</w>` marks the end of a word."""
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
        """Return the token ids of a text of any length, without BOS, EOS and padding."""
        return [self.vocabulary[token] for token in self.tokenize(text)]

    def decode(self, ids: Iterable[int] | torch.Tensor, skip_special_tokens: bool = False) -> str:
        """Decode token ids to lower-case text, with spaces between words and � for invalid UTF-8."""
        skipped = {BOS, EOS, self.pad_token} if skip_special_tokens else set()
        tokens = [token for token in (self._tokens[int(i)] for i in ids) if token not in skipped]
        text = bytes(self._bytes[symbol] for symbol in "".join(tokens)).decode(errors="replace")
        return text.replace(END_OF_WORD, " ").strip()

    def __call__(self, texts: str | Sequence[str], max_length: int = 77) -> torch.Tensor:
        """Return token ids (n, max_length) of n texts: BOS, the tokens (truncated if too long), EOS, padding."""
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            row = [self.bos_token_id, *self.encode(text)[: max_length - 2], self.eos_token_id]
            rows.append(row + [self.pad_token_id] * (max_length - len(row)))
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), max_length)

    def truncated(self, text: str, max_length: int = 77) -> str:
        """Return the part of the text that `__call__` cuts off to fit into max_length ids."""
        return self.decode(self.encode(text)[max_length - 2 :])


def _join(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Merge all occurrences of a pair, from left to right."""
    joined = symbols[:1]
    for symbol in symbols[1:]:
        if (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def _finder(tokens: Iterable[str]) -> re.Pattern[str]:
    """Compile a pattern that matches any of the tokens, longest first, in a group, so that `split` keeps them."""
    return re.compile(f"({'|'.join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))})")
