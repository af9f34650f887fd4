"""Weighted prompts, and long prompts in chunks of 75 tokens.

    a (fox) in the [snow], (red:1.3) leaves        weights: fox 1.1, snow 1/1.1, red 1.3, everything else 1
    a fox BREAK snow                               a new chunk at BREAK

The syntax is that of AUTOMATIC1111's web UI, but weights are applied differently. Here a token's embedding is
interpolated or extrapolated from that of the empty prompt; the web UI multiplies embeddings, then restores their mean.
The resulting images are similar, not identical.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Collection, Sequence
from itertools import chain, groupby

import torch
from torch import Tensor

from minisd.tokenizer import Tokenizer

FACTORS = {"(": 1.1, "[": 1 / 1.1}
OPENING = {")": "(", "]": "["}
MAX_WEIGHT = 10.0  # in absolute value
TOKENS_PER_CHUNK = 75  # excluding the start and end tokens
MAX_CHUNKS = 8  # per prompt
MAX_DEPTH = 64  # of open brackets: the time to apply their weights grows with it
MAX_CONTEXT_CHUNKS = 64  # per batch; lcm(7, 8) = 56
MAX_CHARACTERS, MAX_WORD = 50_000, 2_000  # far beyond 8 chunks; tokenization is quadratic in the length of a word

BREAK = re.compile(r"\s*\bBREAK\b\s*")
BRACKET = re.compile(r"[()\[\]]")
NUMBER = r"[+-]?(?:[0-9.]+(?:e[+-]?[0-9]+)?|nan|inf|infinity)"
# An escaped character, a weight with its closing bracket, a bracket, a run of text, or any other character.
SYNTAX = re.compile(rf"(?si)\\[()\[\]\\]|:\s*(?P<number>{NUMBER})\s*\)|[()\[\]]|[^()\[\]\\:]+|.")
# Syntax of other programs and extensions. Each pattern takes linear time.
FOREIGN = {
    "a choice of Dynamic Prompts": re.compile(r"\{[^{}|]*\|[^{}]*\}"),
    "a wildcard": re.compile(r"__[\w/*-]+__"),
    "an embedding of ComfyUI, which is loaded as a textual inversion": re.compile(r"\bembedding:[^\s,:()]+"),
    "a tag of another program": re.compile(r"<(?!(?:lora|lyco|hypernet):)\w+:[^<>]*>"),
    "syntax of InvokeAI": re.compile(r"\w\+\+|[^\s()]\)[+-]+(?![^\s,.)])|\)\.(?:and|blend|swap)\("),
    "an emphasis of NovelAI": re.compile(r"\{[^{}|]*\}"),
    "a keyword of an extension": re.compile(r"\b(?:ADD(?:BASE|COMM|COL|ROW)|AND_(?:PERP|SALT|TOPK))\b"),
    "an option of Midjourney": re.compile(r"(?<!\S)--(?:ar|v|no|s|q|niji|seed|stylize|chaos)\b"),
}

Chunk = list[tuple[int, float]]  # token ids with their weights


class _Weights:
    """The weights of the pieces parsed so far; closing a bracket scales those inside it."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.open: dict[str, list[int]] = {"(": [], "[": []}

    def close(self, bracket: str, factor: float) -> None:
        for i in range(self.open[bracket].pop(), len(self.values)):
            self.values[i] *= factor

    def close_all(self) -> None:
        for bracket, factor in FACTORS.items():
            while self.open[bracket]:
                self.close(bracket, factor)


def parse(prompt: str) -> list[tuple[str, float]]:
    r"""Parse a prompt into (text, weight) pairs, merging adjacent pieces of equal weight.

    (text) multiplies the weight by 1.1, [text] divides it by 1.1, (text:1.3) multiplies it by 1.3; nested brackets
    multiply. \( \) \[ \] and \\ are literal characters. An unclosed bracket extends to the end of the prompt, and an
    unmatched closing bracket is literal. In a prompt without brackets, backslashes are literal.

    Raises:
        TypeError: If the prompt is not a string.
        ValueError: If a weight is not a number in [-10, 10], or the prompt is too long to tokenize.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be a str, got {type(prompt).__name__}: {prompt!r:.80}")
    check_length(prompt)  # before anything whose time grows faster than the length
    if not BRACKET.search(prompt):
        return [(prompt, 1.0)]
    texts, weights = [], _Weights()
    for match in SYNTAX.finditer(prompt):
        token, number = match[0], match["number"]
        if token in FACTORS:
            weights.open[token].append(len(weights.values))
            if sum(map(len, weights.open.values())) > MAX_DEPTH:
                raise ValueError(f"the prompt {prompt[:40]!r} … has more than {MAX_DEPTH} open brackets: close some")
        elif number and weights.open["("]:
            weights.close("(", _check_weight(number, token, prompt))
        elif token in OPENING and weights.open[OPENING[token]]:
            weights.close(OPENING[token], FACTORS[OPENING[token]])
        else:
            texts.append(token[1:] if len(token) == 2 and token[0] == "\\" else token)
            weights.values.append(1.0)
    weights.close_all()
    # rounding makes 1.1 · 1/1.1 equal to 1 in any order
    groups = groupby(zip(texts, weights.values, strict=True), key=lambda piece: round(piece[1], 9))
    pieces = [("".join(text for text, _ in group), weight) for weight, group in groups]
    weighted = [(text, _check_weight(weight, text, prompt)) for text, weight in pieces]
    return weighted or [("", 1.0)]


def escape(text: str) -> str:
    """Escape brackets and backslashes so that `parse` returns the text unchanged, at weight 1."""
    return re.sub(r"[()\[\]\\]", r"\\\g<0>", text) if BRACKET.search(text) else text


def read(prompt: str, tokenizer: Tokenizer) -> list[Chunk]:
    """Tokenize a prompt into one or more chunks of at most 75 weighted token ids.

    The tokens of a textual inversion are kept in one chunk. Raises ValueError for an invalid prompt (see `parse`) and
    for more than 8 chunks.
    """
    chunks: list[Chunk] = [[]]
    for part, weight, is_new in _parts(prompt):
        chunks += [[]] if is_new else []
        tokens, i = tokenizer.tokenize(part), 0
        while i < len(tokens):
            size = len(tokenizer.added.get(tokens[i], ("",)))
            size = size if size <= TOKENS_PER_CHUNK else 1
            if len(chunks[-1]) + size > TOKENS_PER_CHUNK:
                chunks.append([])
            chunks[-1] += [(tokenizer.vocabulary[token], weight) for token in tokens[i : i + size]]
            i += size
    if len(chunks) > 1 and not chunks[-1]:
        chunks.pop()  # after a final BREAK
    if len(chunks) > MAX_CHUNKS:
        raise ValueError(
            f"the prompt has {sum(map(len, chunks))} tokens, which is {len(chunks)} chunks of {TOKENS_PER_CHUNK}; "
            f"expected at most {MAX_CHUNKS} ({MAX_CHUNKS * TOKENS_PER_CHUNK} tokens): shorten {prompt[:40]!r} …"
        )
    return chunks


def _parts(prompt: str) -> list[tuple[str, float, bool]]:
    """Parse a prompt into (text, weight, whether it follows a BREAK)."""
    return [(part, weight, i > 0) for text, weight in parse(prompt) for i, part in enumerate(BREAK.split(text))]


def warn_of_foreign(prompt: str, words: Collection[str]) -> None:
    """Warn about syntax of other programs, other than learned `words`, which is drawn as words."""
    for kind, pattern in FOREIGN.items():
        if (found := pattern.search(prompt)) and found[0] not in words:
            warnings.warn(f"{found[0][:80]!r} in the prompt is {kind}; it is drawn as words", stacklevel=1)


def rows(chunks: Sequence[Chunk], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Add start, end and padding tokens; return ids and weights, both (chunks, 77). Added tokens have weight 1."""
    ids = [[tokenizer.bos_token_id, *(number for number, _ in chunk), tokenizer.eos_token_id] for chunk in chunks]
    weights = [[1.0, *(weight for _, weight in chunk)] for chunk in chunks]
    length = TOKENS_PER_CHUNK + 2
    return (
        torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in ids]),
        torch.tensor([row + [1.0] * (length - len(row)) for row in weights], dtype=torch.float64),
    )


def weigh(context: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """Scale the difference of a context (n, 77, width) from the empty prompt's (77, width) by weights (n, 77).

    Weight 1 leaves an embedding exactly unchanged, and weight 0 gives that of the empty prompt.
    Source: InvokeAI's compel library, for weights of at least 1.
    """
    dtype = torch.promote_types(context.dtype, torch.float32)
    z, e, w = context.to(dtype), empty.to(dtype), weights.to(dtype).to(context.device)[..., None]
    # z' = e + w (z − e), rearranged so that w = 1 gives z exactly
    return (z + (w - 1) * (z - e)).to(context.dtype)


def encode_prompts(prompts: Sequence[str], tokenizer: Tokenizer, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """Encode weighted prompts of up to 600 tokens to text embeddings (n, 77·k, width).

    Args:
        prompts: The prompts. Warns for each one of more than 75 tokens.
        tokenizer: The model's tokenizer.
        encode: The text encoder, a function from ids (rows, 77) to embeddings (rows, 77, width).
    """
    chunked = [read(prompt, tokenizer) for prompt in prompts]
    for prompt, chunks in zip(prompts, chunked, strict=True):
        if len(chunks) > 1 + len(BREAK.findall(prompt)):
            notice = f"it is read in {len(chunks)} chunks of at most {TOKENS_PER_CHUNK}"
            warnings.warn(f"the prompt has {sum(map(len, chunks))} tokens: {notice}", stacklevel=3)
    ids, weights = rows([*chain(*chunked), []], tokenizer)
    weighted = any(weight != 1 for chunk in chain(*chunked) for _, weight in chunk)
    # the last row is the empty prompt, needed only for weights
    context = encode(ids if weighted else ids[:-1])
    if weighted:
        context = weigh(context, context[-1], weights)[:-1]
    if len(context) == len(chunked):
        return context
    contexts = [some.flatten(0, 1)[None] for some in context.split([len(chunks) for chunks in chunked])]
    return torch.cat(common_length(*contexts))


def find_unknown_words(prompt: str, tokenizer: Tokenizer, embeddings: Tensor) -> list[str]:
    """Return the words of a prompt with an untrained token, whose row of `embeddings` (tokens, width) is all zeros."""
    text = BREAK.sub(" ", " ".join(piece for piece, _ in parse(prompt)))
    for word in tokenizer.added:
        text = re.sub(re.escape(word), " ", text, flags=re.IGNORECASE)
    unknown = []
    for word in dict.fromkeys(re.findall(r"[\w'-]+", text)):
        ids = tokenizer.encode(word)
        if ids and not bool(embeddings[torch.tensor(ids, device=embeddings.device)].any(dim=1).all()):
            unknown.append(word)
    return unknown


def common_length(*contexts: Tensor) -> list[Tensor]:
    """Repeat contexts (n, 77·k, width) with different k to the least common multiple of their lengths.

    This leaves attention unchanged: if all keys and values appear r times, their softmax weights are r times smaller
    and sum to the same. Raises ValueError if the common length exceeds 64 chunks.
    """
    rows = TOKENS_PER_CHUNK + 2
    counts = [context.shape[1] // rows for context in contexts]
    common = math.lcm(*counts)
    if common > MAX_CONTEXT_CHUNKS:
        lengths = ", ".join(map(str, sorted(set(counts))))
        raise ValueError(
            f"prompts of {lengths} chunks of {TOKENS_PER_CHUNK} tokens cannot be drawn together: their common length "
            f"is {common} chunks, expected at most {MAX_CONTEXT_CHUNKS}; draw them one at a time, or shorten one"
        )
    return [context.repeat(1, common // count, 1) for context, count in zip(contexts, counts, strict=True)]


def check_length(text: str) -> None:
    """Raise ValueError for a text that takes long to tokenize."""
    longest = max(map(len, text.split()), default=0)
    if len(text) > MAX_CHARACTERS or longest > MAX_WORD:
        raise ValueError(
            f"the prompt has {len(text)} characters, with up to {longest} per word; expected at most {MAX_CHARACTERS}, "
            f"with up to {MAX_WORD} per word: shorten it"
        )


def _check_weight(weight: float | str, where: str, prompt: str) -> float:
    """Convert a weight to float. Raises ValueError if it is not a number in [-10, 10]."""
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not abs(value) <= MAX_WEIGHT:
        raise ValueError(
            f"{where!r} in the prompt {prompt[:80]!r} has the weight {weight}; expected a number from {-MAX_WEIGHT:g} "
            f"to {MAX_WEIGHT:g}, such as (fox:1.3). To include literal brackets, escape them: \\( and \\)"
        )
    return value
