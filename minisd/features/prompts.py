"""How a prompt becomes context: weights in brackets, and prompts of any length, read in chunks of 75 tokens.

    a (fox) in the [snow], (red:1.3) leaves        fox 1.1, snow 1/1.1, red 1.3, all else 1

The syntax is the community's, as in the popular web UI. What a weight does is not: here the vector of a token is moved
along the line from that of the empty prompt; the web UI multiplies it, and then scales all of them so that their mean
is what it was. The same brackets so give pictures that are alike, and not equal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from minisd.tokenizer import Tokenizer

FACTORS = {"(": 1.1, "[": 1 / 1.1}
OPENING = {")": "(", "]": "["}
LARGEST = 10.0  # weight, of either sign
ROOM = 75  # tokens of a chunk, without its start and end
MOST = 8  # chunks of one prompt
LONGEST = 64  # chunks of the context of a batch; more than 56, the least common multiple of 7 and 8
MAX_CHARACTERS, MAX_WORD = 50_000, 2_000  # far beyond 8 chunks; the tokenizer takes quadratic time for a long word

BRACKET = re.compile(r"[()\[\]]")
NUMBER = r"[+-]?(?:[0-9.]+(?:e[+-]?[0-9]+)?|nan|inf|infinity)"
# An escaped character, a number that closes a bracket, a bracket, a run of text, or whatever is left.
SYNTAX = re.compile(rf"(?si)\\[()\[\]\\]|:\s*(?P<number>{NUMBER})\s*\)|[()\[\]]|[^()\[\]\\:]+|.")

Chunk = list[tuple[int, float]]


def parse(prompt: str) -> list[tuple[str, float]]:
    r"""The pieces of a prompt, each with its weight; neighbours of equal weight are one piece.

    (text) multiplies by 1.1, [text] divides by it, (text:1.3) multiplies by 1.3, and nested ones multiply. \( \) \[ \]
    and \\ are characters. A bracket that nothing closes reaches to the end, one that closes nothing is text. A prompt
    without brackets is taken as it is, backslashes too. Raises ValueError for a weight that is no number, or beyond
    ±10, TypeError unless the prompt is a str.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"expected the prompt as a str, got {type(prompt).__name__}: {prompt!r:.80}")
    if not BRACKET.search(prompt):
        return [(_check_length(prompt), 1.0)]
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        for i in range(opened[bracket].pop(), len(weights)):
            weights[i] *= factor

    for match in SYNTAX.finditer(prompt):
        found, number = match[0], match["number"]
        if found in opened:
            opened[found].append(len(weights))
        elif number and opened["("]:
            close("(", _checked(number, found, prompt))
        elif found in OPENING and opened[OPENING[found]]:
            close(OPENING[found], FACTORS[OPENING[found]])
        else:
            texts.append(found[1:] if len(found) == 2 and found[0] == "\\" else found)
            weights.append(1.0)
    for bracket, factor in FACTORS.items():
        while opened[bracket]:
            close(bracket, factor)
    # rounded, so that 1.1 · 1/1.1 is 1 whatever the order
    pieces = groupby(zip(texts, weights, strict=True), key=lambda piece: round(piece[1], 9))
    joined = [("".join(text for text, _ in some), weight) for weight, some in pieces]
    weighted = [(text, _checked(weight, text, prompt)) for text, weight in joined]
    _check_length("".join(texts))
    return weighted or [("", 1.0)]


def escape(text: str) -> str:
    """The prompt that `parse` reads as this text, at weight 1, brackets and all."""
    return re.sub(r"[()\[\]\\]", r"\\\g<0>", text) if BRACKET.search(text) else text


def read(prompt: str, tokenizer: Tokenizer) -> list[Chunk]:
    """The ids of a prompt, each with its weight, in chunks of at most 75, one at least.

    The tokens of a word that was added (see `textual_inversion.add_token`) stay in one chunk. Raises ValueError for
    more than 8 chunks, and what `parse` does.
    """
    chunks: list[Chunk] = [[]]
    for text, weight in parse(prompt):
        tokens, at = tokenizer.tokenize(text), 0
        while at < len(tokens):
            size = len(tokenizer.added.get(tokens[at], ("",)))
            size = size if size <= ROOM else 1
            if len(chunks[-1]) + size > ROOM:
                chunks.append([])
            chunks[-1] += [(tokenizer.vocabulary[token], weight) for token in tokens[at : at + size]]
            at += size
    if len(chunks) > MOST:
        raise ValueError(
            f"the prompt has {sum(map(len, chunks))} tokens, which is {len(chunks)} chunks of {ROOM}; expected at most "
            f"{MOST} ({MOST * ROOM} tokens), since each costs memory: shorten it ({prompt[:40]!r} …)"
        )
    return chunks


def rows(chunks: Sequence[Chunk], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Chunks with start, end and padding: ids (chunks, 77) and weights (chunks, 77), 1 for what is not of the text."""
    ids = [[tokenizer.bos_token_id, *(number for number, _ in chunk), tokenizer.eos_token_id] for chunk in chunks]
    weights = [[1.0, *(weight for _, weight in chunk)] for chunk in chunks]
    length = ROOM + 2
    return (
        torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in ids]),
        torch.tensor([row + [1.0] * (length - len(row)) for row in weights], dtype=torch.float64),
    )


def weigh(context: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """Move each vector of a context (n, 77, width) away from that of the empty prompt, (77, width), by its weight.

    weights (n, 77). 1 changes nothing, not a bit; 0 leaves what the empty prompt has there.
    Source: Stewart's library compel (InvokeAI), for weights from 1 on; for smaller ones it does something else.
    """
    wide = torch.promote_types(context.dtype, torch.float32)
    z, e, w = context.to(wide), empty.to(wide), weights.to(wide).to(context.device)[..., None]
    # z' = e + w (z − e), written so that w = 1 gives z exactly
    return (z + (w - 1) * (z - e)).to(context.dtype)


def common_length(*contexts: Tensor) -> list[Tensor]:
    """Contexts (n, 77·k, width) of any k at one length, the least common multiple, by repeating whole ones.

    Attention sees no difference: keys and values that all come r times have softmax weights r times smaller, which sum
    to the same. Raises ValueError where the common length would be more than 64 chunks.
    """
    lengths = [context.shape[1] for context in contexts]
    length = math.lcm(*lengths)
    if length > LONGEST * (ROOM + 2):
        counts = ", ".join(str(each // (ROOM + 2)) for each in sorted(set(lengths)))
        raise ValueError(
            f"prompts of {counts} chunks of {ROOM} tokens cannot be drawn together: their common length would be "
            f"{length // (ROOM + 2)} chunks, expected at most {LONGEST}. Draw them one by one, or shorten one"
        )
    return [context.repeat(1, length // each, 1) for context, each in zip(contexts, lengths, strict=True)]


def _check_length(text: str) -> str:
    longest = max(map(len, text.split()), default=0)
    if len(text) > MAX_CHARACTERS or longest > MAX_WORD:
        raise ValueError(
            f"the prompt has {len(text)} characters, {longest} of them in one word; expected at most {MAX_CHARACTERS} "
            f"and {MAX_WORD}: shorten it"
        )
    return text


def _checked(weight: float | str, where: str, prompt: str) -> float:
    """A weight as a float; ValueError for what is no number, not finite, or out of range."""
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not abs(value) <= LARGEST:
        raise ValueError(
            f"{where!r} in the prompt {prompt[:80]!r} has the weight {weight}; expected a number from {-LARGEST:g} to "
            f"{LARGEST:g}, such as (fox:1.3). To write brackets as text, put a backslash before each: \\( and \\)"
        )
    return value
