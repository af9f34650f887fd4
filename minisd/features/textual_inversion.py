"""Textual inversion: a new word whose token vectors were learned from a few pictures.

Source: Gal et al. 2022, "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion",
section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minisd.features.validate import check_strings
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import END_OF_WORD, Tokenizer, normalize

TABLE = "text_model.embeddings.token_embedding.weight"  # the token vectors, in the state of a TextEncoder


def add_token(tokenizer: Tokenizer, token: str, count: int = 1) -> Tokenizer:
    """Return a tokenizer that turns one more word into `count` new tokens, which take the next free ids.

    As in transformers, the word is found wherever it occurs, in either case, before a text is split. As in diffusers,
    its tokens are called word, word_1, word_2 …

    Raises:
        TypeError: the word is not a string.
        ValueError: the word is empty, or a token already.
    """
    if not isinstance(token, str):
        raise TypeError(f"token={token!r:.80}; expected the new word, as a string")
    (token,) = check_strings("token", token)
    word = normalize(token).strip()
    names = (word, *(f"{word}_{i}" for i in range(1, count)))
    if not word or count < 1:
        raise ValueError(f"expected a word that stands for 1 token or more, got {token!r} for {count}")
    if taken := [name for name in names if {name, name + END_OF_WORD} & tokenizer.vocabulary.keys()]:
        raise ValueError(f"{taken[0]!r} is a token already; choose a new word, such as '<{word}-new>'")
    vocabulary = tokenizer.vocabulary | {name: len(tokenizer.vocabulary) + i for i, name in enumerate(names)}
    added = tokenizer.added | {name: (name,) for name in names} | {word: names}
    return Tokenizer(vocabulary, list(tokenizer.ranks), tokenizer.pad_token, added)


def add_word(tokenizer: Tokenizer, text_encoder: TextEncoder, token: str, vectors: Tensor) -> Tokenizer:
    """Give a word its vectors (n, width): the text encoder gets a longer table, and a new tokenizer is returned.

    The old table and the old tokenizer remain unchanged.

    Raises:
        ValueError: the word is a token already, the vectors have another width than the table, or the table and the
            tokenizer have different lengths.
    """
    table = text_encoder.token_embedding.weight
    if vectors.shape[-1] != table.shape[1]:
        raise ValueError(
            f"the vectors of {token!r} have {vectors.shape[-1]} numbers; this text encoder takes {table.shape[1]}. "
            "Use a textual inversion made for this kind of model"
        )
    if len(table) != len(tokenizer.vocabulary):
        raise ValueError(
            f"the text encoder has {len(table)} token vectors and the tokenizer {len(tokenizer.vocabulary)} tokens; "
            "load the model again, and give each model its own text encoder"
        )
    extended = add_token(tokenizer, token, len(vectors))
    embedding = nn.Embedding.from_pretrained(torch.cat([table.detach(), vectors.to(table)]))
    text_encoder.text_model["embeddings"].token_embedding = embedding
    return extended
