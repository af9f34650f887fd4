"""Textual inversion: a new word whose token embeddings are learned from a few images.

Source: Gal et al. 2022, "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion",
section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minisd.features.validate import check_strings
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import END_OF_WORD, Tokenizer, normalize

MAX_WORD, MAX_VECTORS = 200, 600  # characters and tokens of a word; a prompt has at most 600 tokens
TABLE = "text_model.embeddings.token_embedding.weight"  # the token embeddings in a TextEncoder's state dict


def add_token(tokenizer: Tokenizer, token: str, count: int = 1) -> Tokenizer:
    """Return a tokenizer with a new word of `count` tokens, which get the next free ids.

    As in transformers, the word is matched anywhere in a text, ignoring case, before the text is split. As in
    diffusers, its tokens are named word, word_1, word_2 …

    Raises:
        TypeError: If the word is not a string.
        ValueError: If the word is empty, too long or already in the vocabulary.
    """
    if not isinstance(token, str):
        raise TypeError(f"token={token!r:.80}; expected a string")
    (token,) = check_strings("token", token)
    if len(token) > MAX_WORD or count > MAX_VECTORS:
        found = f"{len(token)} characters with {count} tokens"
        raise ValueError(f"the word has {found}; expected at most {MAX_WORD} with {MAX_VECTORS}: pass a shorter token")
    word = normalize(token).strip()
    names = (word, *(f"{word}_{i}" for i in range(1, count)))
    if not word or count < 1:
        raise ValueError(f"expected a non-empty word with at least 1 token, got {token!r} with {count}")
    if taken := [name for name in names if {name, name + END_OF_WORD} & tokenizer.vocabulary.keys()]:
        raise ValueError(f"{taken[0]!r} is already in the vocabulary; choose a new word, such as '<{word}-new>'")
    vocabulary = tokenizer.vocabulary | {name: len(tokenizer.vocabulary) + i for i, name in enumerate(names)}
    added = tokenizer.added | {name: (name,) for name in names} | {word: names}
    return Tokenizer(vocabulary, list(tokenizer.ranks), tokenizer.pad_token, added)


def add_word(tokenizer: Tokenizer, text_encoder: TextEncoder, token: str, vectors: Tensor) -> Tokenizer:
    """Add a word with embeddings (n, width) to a text encoder, in place, and return the extended tokenizer.

    The text encoder gets a new embedding module; the previous one and the given tokenizer are not modified.

    Raises:
        ValueError: If the word is already in the vocabulary, the embeddings have the wrong width, or the text encoder
            and the tokenizer have different vocabulary sizes.
    """
    table = text_encoder.token_embedding.weight
    if vectors.shape[-1] != table.shape[1]:
        raise ValueError(
            f"the embeddings of {token!r} have width {vectors.shape[-1]}; expected {table.shape[1]}. Use a textual "
            "inversion trained for this model architecture"
        )
    if len(table) != len(tokenizer.vocabulary):
        raise ValueError(
            f"the text encoder has {len(table)} token embeddings, but the tokenizer has {len(tokenizer.vocabulary)} "
            "tokens; reload the model, and do not share a text encoder between models"
        )
    extended = add_token(tokenizer, token, len(vectors))
    embedding = nn.Embedding.from_pretrained(torch.cat([table.detach(), vectors.to(table)]))
    text_encoder.text_model["embeddings"].token_embedding = embedding
    return extended
