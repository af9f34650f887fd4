"""Reading and writing of tokenizer folders: vocab.json and merges.txt, or tokenizer.json, and the pad token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from minisd.io.configs import read_json, write_json
from minisd.tokenizer import BOS, END_OF_WORD, EOS, Tokenizer, byte_symbols, normalize


def read_tokenizer(folder: str | PathLike[str]) -> Tokenizer:
    """Load the `tokenizer` folder of a Stable Diffusion model.

    Raises:
        FileNotFoundError: If the folder has neither vocab.json and merges.txt nor tokenizer.json.
        ValueError: If the files are corrupted or do not belong to the same model.
    """
    folder = Path(folder)
    try:
        vocabulary, lines = _read_vocabulary(folder)
        pairs = (line.split(" ") if isinstance(line, str) else line for line in lines)
        merges, pad_token = [(left, right) for left, right in pairs], _read_pad_token(folder)
        words = _read_words(folder, len(vocabulary), vocabulary)
        check_vocabulary(vocabulary, merges, pad_token)
        return Tokenizer(vocabulary | {word: i for i, word in words}, merges, pad_token, _placeholders(words))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the tokenizer in {folder} is corrupted ({error}); download it again") from error


def check_vocabulary(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], pad_token: str = EOS) -> None:
    """Raise ValueError unless the vocabulary matches the merges, with ids from 0, and contains the pad token."""
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + END_OF_WORD for symbol in symbols)]
    tokens += [*(left + right for left, right in merges), BOS, EOS]
    ids = list(vocabulary.values())
    numbered = all(type(i) is int for i in ids) and sorted(ids) == list(range(len(tokens)))
    if vocabulary.keys() != set(tokens) or not numbered:
        raise ValueError(
            f"the vocabulary has {len(vocabulary)} tokens, expected {len(tokens)} from id 0 on: 512 byte symbols, "
            f"{len(merges)} merges, 2 special tokens. Only in one of the two: "
            f"{sorted(vocabulary.keys() ^ set(tokens))[:3]}. Use the vocabulary and merges of one model"
        )
    if pad_token not in vocabulary:
        raise ValueError(f"pad token {pad_token!r} is not in the vocabulary; expected {EOS!r} or '!'")


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Save the files of transformers' CLIPTokenizer; learned words in added_tokens.json."""

    def special(content: str) -> dict[str, Any]:
        # "normalized" also matches in lower-cased text, such as <|ENDOFTEXT|>
        return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    tokens = {"bos_token": special(BOS), "eos_token": special(EOS), "unk_token": special(EOS)}
    pad = {"pad_token": tokenizer.pad_token}
    typed = {name: {"__type": "AddedToken"} | value for name, value in tokens.items()}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, "errors": "replace"}
    words = {token: i for token, i in tokenizer.vocabulary.items() if token in tokenizer.added}
    vocabulary = {token: i for token, i in tokenizer.vocabulary.items() if token not in words}
    write_json(folder / "vocab.json", vocabulary, indent=None)
    if words:
        write_json(folder / "added_tokens.json", words)
    write_json(folder / "special_tokens_map.json", tokens | pad)
    write_json(folder / "tokenizer_config.json", config | pad | typed)
    merges = "".join(f"{left} {right}\n" for left, right in tokenizer.ranks)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8", newline="\n")


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], list[Any]]:
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        return read_json(folder / "vocab.json"), [line for line in lines if line and not line.startswith("#version")]
    if (folder / "tokenizer.json").is_file():
        model = read_json(folder / "tokenizer.json")["model"]
        return model["vocab"], model["merges"]
    raise FileNotFoundError(
        f"{folder} is not a tokenizer folder; expected vocab.json and merges.txt, or tokenizer.json, as in the "
        "`tokenizer` folder of a Stable Diffusion model"
    )


def _read_words(folder: Path, count: int, vocabulary: Mapping[str, int]) -> list[tuple[int, str]]:
    """Return the ids and names of words that were added to the vocabulary, which has `count` tokens.

    They are in added_tokens.json or, by newer versions of transformers, in tokenizer_config.json or tokenizer.json.
    """
    words: dict[str, int] = {}
    if (path := folder / "tokenizer.json").is_file():
        words |= {each["content"]: each["id"] for each in read_json(path).get("added_tokens") or ()}
    if (path := folder / "tokenizer_config.json").is_file():
        decoder = read_json(path).get("added_tokens_decoder") or {}
        words |= {each["content"]: int(number) for number, each in decoder.items()}
    if (path := folder / "added_tokens.json").is_file():
        words |= read_json(path)
    added = sorted((i, normalize(word)) for word, i in words.items() if word not in vocabulary)
    if [i for i, _ in added] != list(range(count, count + len(added))) or not all(word.strip() for _, word in added):
        raise ValueError(f"the added tokens {added[:3]} do not continue the vocabulary, whose last id is {count - 1}")
    return added


def _placeholders(words: Sequence[tuple[int, str]]) -> dict[str, tuple[str, ...]]:
    """Return the tokens of each added word. As in diffusers, word, word_1, word_2 … are the vectors of one word."""
    names = {word for _, word in words}
    placeholders = {}
    for word in names:
        tokens = [word]
        while f"{word}_{len(tokens)}" in names:
            tokens.append(f"{word}_{len(tokens)}")
        placeholders[word] = tuple(tokens)
    return placeholders


def _read_pad_token(folder: Path) -> str:
    for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        if path.is_file() and (token := read_json(path).get("pad_token")):
            return token["content"] if isinstance(token, dict) else token
    return EOS
