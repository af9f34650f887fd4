"""CLIP's byte-pair encoding: a prompt becomes 77 numbers between 0 and 49,407.

The steps: normalise the text, split it into words, write each word as symbols that stand for its UTF-8 bytes,
then join neighbouring symbols, always the pair that ranks first in a list of merges learned from captions.

Sources: Sennrich et al. 2016 (arXiv 1508.07909) for the method; Radford et al. 2021 (arXiv 2103.00020), CLIP.
It behaves as `transformers.CLIPTokenizer` does. The shipped merges are lines 2 to 48,895 of OpenAI CLIP's
bpe_simple_vocab_16e6.txt (MIT, assets/licenses/CLIP-MIT.txt), from the PyPI package clip-anytorch. They fix
the vocabulary: 256 byte symbols, the same at the end of a word, a token for each merge, start and end.
"""

import copy
import heapq
import json
import re
import string
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from minisd.features.validate import check_strings as texts

BOS, EOS, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"
# Unicode's White_Space property; Python's own `\s` adds \x1c to \x1f.
WHITE_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
# A word, in `_kind`'s alphabet: an English contraction, a run of letters, one digit, a run of anything else.
WORD = re.compile(r"'(?:[stmd]|re|ve|ll)|[a-zL]+|N|[^a-zLN ]+")
KEPT = frozenset(string.ascii_lowercase + "' ")


def byte_symbols() -> list[str]:
    """The 256 printable characters that stand for the bytes 0 to 255, in byte order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def normalize(text: str) -> str:
    """Text in Unicode's composed form (NFC), white space folded to blanks, each character in lower case."""
    folded = WHITE_SPACE.sub(" ", unicodedata.normalize("NFC", text))
    return "".join(character.lower() for character in folded)  # "Σ".lower() depends on what surrounds it


def _kind(character: str) -> str:
    """L for a letter, N for a number, P for the rest; a to z, apostrophe and blank stand for themselves."""
    if character in KEPT:
        return character
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "P"


def split_words(text: str) -> list[str]:
    """Cut normalised text into the words inside which symbols are merged; blanks are dropped."""
    return [text[slice(*match.span())] for match in WORD.finditer("".join(map(_kind, text)))]


class Tokenizer:
    """CLIP's tokenizer: text to token ids and back. It never changes once built, so threads may share it.

    `vocabulary` maps tokens to ids, `merges` lists pairs of symbols by rank, `pad_token` fills up rows:
    the end of text in SD 1, "!" (id 0) in SD 2. Raises ValueError where they do not belong together.
    """

    def __init__(self, vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], pad_token: str = EOS):
        self._symbols = byte_symbols()
        tokens = [*self._symbols, *(symbol + END_OF_WORD for symbol in self._symbols)]
        tokens += [*(left + right for left, right in merges), BOS, EOS]
        ids = vocabulary.values()
        whole = all(type(i) is int for i in ids) and sorted(ids) == list(range(len(tokens)))
        if set(tokens) != vocabulary.keys() or not whole:
            raise ValueError(
                f"the vocabulary has {len(vocabulary)} tokens, expected {len(tokens)} from id 0 on: 512 byte "
                f"symbols, {len(merges)} merges, 2 special tokens. Not in both: "
                f"{sorted(vocabulary.keys() ^ set(tokens))[:3]}. Use the vocabulary and merges of one model."
            )
        if pad_token not in vocabulary:
            raise ValueError(f"pad token {pad_token!r} is not in the vocabulary: use {EOS!r} or '!'.")
        self.vocabulary, self.pad_token = dict(vocabulary), pad_token
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.bos_token_id, self.eos_token_id = vocabulary[BOS], vocabulary[EOS]
        self.pad_token_id = vocabulary[pad_token]
        self._tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        self._bytes = {symbol: byte for byte, symbol in enumerate(self._symbols)}
        self._special = {BOS, EOS, pad_token}
        self.added: dict[str, tuple[str, ...]] = {}
        # As in transformers, the pad token counts only as typed, other special tokens in either case.
        self._exact = _finder([pad_token])
        self._folded = _finder({BOS, EOS} - {pad_token})

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str] | None = None) -> "Tokenizer":
        """Read vocab.json and merges.txt, or else tokenizer.json; by default the files shipped here.

        Raises FileNotFoundError where they are missing and ValueError where they are damaged.
        """
        root = Path(str(resources.files("minisd") / "assets/tiny/tokenizer") if folder is None else folder)
        try:
            vocabulary, merges = _read_vocabulary(root)
            split = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
            return cls(vocabulary, [(left, right) for left, right in split], _read_pad_token(root))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the tokenizer in {root} is damaged, fetch its files again: {error}") from error

    def with_token(self, token: str, count: int = 1) -> "Tokenizer":
        """A copy of this tokenizer that turns one more word into `count` new tokens, which take the next free ids.

        As in transformers the word is found wherever it stands, in either case, before the text is split. As in
        diffusers its tokens are the word, word_1, word_2 … Raises ValueError for a word that is a token already.
        """
        if not isinstance(token, str):
            raise TypeError(f"token={token!r:.80}; expected the new word, as a string")
        (token,) = texts("token", token)
        word = normalize(token).strip()
        names = (word, *(f"{word}_{i}" for i in range(1, count)))
        if not word or count < 1:
            raise ValueError(f"expected a word that stands for 1 token or more, got {token!r} for {count}")
        if taken := [name for name in names if {name, name + END_OF_WORD} & self.vocabulary.keys()]:
            raise ValueError(f"{taken[0]!r} is a token already; choose a word that is none, such as '<{word}-new>'")
        grown = copy.copy(self)
        grown.added = self.added | {name: (name,) for name in names} | {word: names}
        grown.vocabulary = self.vocabulary | {name: len(self._tokens) + i for i, name in enumerate(names)}
        grown._tokens = self._tokens + ["".join(self._symbols[byte] for byte in name.encode()) for name in names]
        grown._folded = _finder({BOS, EOS, *grown.added} - {self.pad_token})
        return grown

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text as strings, `</w>` ending each word. Raises TypeError unless it is a str."""
        if not isinstance(text, str):
            raise TypeError(f"expected the text as a str, got {type(text).__name__}: {text!r:.80}")
        tokens: list[str] = []
        for part in self._exact.split(text):
            if part == self.pad_token:
                tokens.append(part)
                continue
            for piece in self._folded.split(normalize(part)):
                if self._folded.fullmatch(piece):
                    tokens += self.added.get(piece, (piece,))
                else:
                    tokens += [token for word in split_words(piece) for token in self._merge(word)]
        return tokens

    def encode(self, text: str) -> list[int]:
        """The ids of a text, however many, without start, end and padding."""
        return [self.vocabulary[token] for token in self.tokenize(text)]

    def decode(self, ids: Iterable[int] | torch.Tensor, skip_special_tokens: bool = False) -> str:
        """The text that ids stand for: lower case, a blank after each word, � for bytes that are not UTF-8.

        Raises ValueError for an id outside the vocabulary.
        """
        numbers = [int(i) for i in ids]
        if unknown := [i for i in numbers if not 0 <= i < len(self._tokens)]:
            raise ValueError(f"id {unknown[0]} is outside the vocabulary (0 to {len(self._tokens) - 1}).")
        tokens = [self._tokens[i] for i in numbers]
        symbols = "".join(t for t in tokens if not (skip_special_tokens and t in self._special))
        text = bytes(self._bytes[symbol] for symbol in symbols).decode("utf-8", errors="replace")
        return text.replace(END_OF_WORD, " ").strip()

    def __call__(self, texts: str | list[str], max_length: int = 77) -> torch.Tensor:
        """Ids (n, max_length) of n texts, one text being n = 1: start, text, end, padding.

        A text of more than max_length - 2 tokens is cut there (see `truncated`); the end token always stays.
        """
        room, rows = _room(max_length), []
        for text in list(texts) if isinstance(texts, (list, tuple)) else [texts]:
            row = [self.bos_token_id, *self.encode(text)[:room], self.eos_token_id]
            rows.append(row + [self.pad_token_id] * (max_length - len(row)))
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), max_length)

    def truncated(self, text: str, max_length: int = 77) -> str:
        """The end of a text that finds no room in max_length ids, so no model sees it; "" if all fits."""
        return self.decode(self.encode(text)[_room(max_length) :])

    def merge_steps(self, word: str) -> list[list[str]]:
        """The symbols of one word before the first merge and after each: from single bytes to tokens."""
        words = split_words(normalize(word))
        if len(words) != 1:
            raise ValueError(f"expected one word, got {word!r}, which splits into {words}.")
        first = self._spell(words[0])
        return [first, *([s for s in symbols if s] for symbols in self._merges(list(first)))]

    def _spell(self, word: str) -> list[str]:
        try:
            symbols = [self._symbols[byte] for byte in word.encode("utf-8")]
        except UnicodeEncodeError as error:
            raise ValueError(f"expected valid Unicode, got half a surrogate pair in {word!r:.80}") from error
        return [*symbols[:-1], symbols[-1] + END_OF_WORD]

    def _merge(self, word: str) -> list[str]:
        symbols = self._spell(word)
        for _ in self._merges(symbols):
            pass
        return [symbol for symbol in symbols if symbol]

    def _merges(self, symbols: list[str]) -> Iterator[list[str]]:
        """Join neighbours in place, best rank first, then leftmost, and yield after each merge.

        A symbol that its left neighbour took in becomes "". With a heap, n symbols take O(n log n).
        """
        following, preceding = [*range(1, len(symbols) + 1), 0], [*range(-1, len(symbols))]
        symbols.append("")  # closes the chain into a ring: no pair holds ""

        def ranked(left: int) -> list[tuple[int, int]]:
            pair = symbols[left], symbols[following[left]]
            return [(self.ranks[pair], left)] if pair in self.ranks else []

        queue = [entry for left in range(len(symbols) - 1) for entry in ranked(left)]
        heapq.heapify(queue)
        while queue:
            entry = heapq.heappop(queue)
            left = entry[1]
            if [entry] != ranked(left):
                continue  # one of the two has been merged since
            right = following[left]
            symbols[left], symbols[right] = symbols[left] + symbols[right], ""
            following[left] = following[right]
            preceding[following[right]] = left
            for changed in (*ranked(preceding[left]), *ranked(left)):
                heapq.heappush(queue, changed)
            yield symbols


def _finder(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds tokens in a text, the longest where several begin; `split` keeps them."""
    return re.compile(f"({'|'.join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))})")


def _room(max_length: int) -> int:
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}, expected 2 or more: start and end take a place each.")
    return max_length - 2


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON in UTF-8: {error}") from error


def _read_vocabulary(root: Path) -> tuple[dict[str, int], list[Any]]:
    if (root / "vocab.json").is_file() and (root / "merges.txt").is_file():
        lines = (root / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        return _read_json(root / "vocab.json"), merges
    if (root / "tokenizer.json").is_file():
        model = _read_json(root / "tokenizer.json")["model"]
        return model["vocab"], model["merges"]
    raise FileNotFoundError(
        f"{root} holds no tokenizer, expected vocab.json and merges.txt, or tokenizer.json: give the "
        "`tokenizer` folder of a Stable Diffusion model, or nothing for the shipped one."
    )


def _read_pad_token(root: Path) -> str:
    for path in (root / "special_tokens_map.json", root / "tokenizer_config.json"):
        if path.is_file() and (token := _read_json(path).get("pad_token")):
            return token["content"] if isinstance(token, dict) else token
    return EOS
