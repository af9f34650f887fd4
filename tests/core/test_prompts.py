"""Prompts: brackets by hand and by grammar, chunks, and prompts of different lengths drawn together."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import last, lively_model, long_prompt, noise
from torch import Tensor

from minisd import StableDiffusion, Tokenizer
from minisd.features.prompts import common_length, escape, parse, read, rows, weigh
from minisd.features.textual_inversion import add_token, add_word

PICTURE: dict[str, Any] = {"num_inference_steps": 3, "sampler": "ddim", "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return lively_model()


def quietly(sd: StableDiffusion, prompts: str | list[str]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sd.encode_text(prompts)


def drawn(sd: StableDiffusion, *prompts: Any, **settings: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return last(sd.denoise(*prompts, **PICTURE | settings))


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# Worked out by hand, by the rules of the web UI: 1.1, 1.1² = 1.21, 1.1³ = 1.331, 1/1.1 = 0.909…, 1/1.21 = 0.826…
PARSED: dict[str, list[tuple[str, float]]] = {
    "": [("", 1)],
    "a fox": [("a fox", 1)],
    "a (red) fox": [("a ", 1), ("red", 1.1), (" fox", 1)],
    "((red))": [("red", 1.21)],
    "[red]": [("red", 1 / 1.1)],
    "[[red]]": [("red", 1 / 1.21)],
    "([red]) fox": [("red fox", 1)],
    "(([red] fox))": [("red", 1.1), (" fox", 1.21)],
    "[[[(((red)))]]] fox": [("red fox", 1)],  # whatever floats make of 1.1³ / 1.1³
    "(red:1.3)": [("red", 1.3)],
    "(red: 1.3 )": [("red", 1.3)],
    "(red:.5)(blue:+2)[x](y:-1)": [("red", 0.5), ("blue", 2), ("x", 1 / 1.1), ("y", -1)],
    "(red:0)": [("red", 0)],
    "(red:2e-1)": [("red", 0.2)],
    "(a (red:1.5) fox:2)": [("a ", 2), ("red", 3), (" fox", 2)],
    "((red:1.3))": [("red", 1.43)],
    "(((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        # the outermost one is never closed, and reaches to the end
        ("house", 1.3 * 1.21), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
        ("sky", 1.1**4), (".", 1.1),
    ],
    "(one)(two)": [("onetwo", 1.1)],
    "a (fox:1) b": [("a fox b", 1)],
    "a (fox": [("a ", 1), ("fox", 1.1)],
    "a [fox (red": [("a ", 1), ("fox ", 1 / 1.1), ("red", 1)],
    "fox) and ]": [("fox) and ]", 1)],
    "fox:1.3) and (cat)": [("fox:1.3) and ", 1), ("cat", 1.1)],
    "a ) (b)": [("a ) ", 1), ("b", 1.1)],
    "(a [b) c]": [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)],
    r"\(a\) (b)": [("(a) ", 1), ("b", 1.1)],
    r"(a \(b\) c:2)": [("a (b) c", 2)],
    r"\[a\]": [("[a]", 1)],
    r"\\(a)": [("\\", 1), ("a", 1.1)],
    r"\\\(a": [(r"\(a", 1)],
    r"C:\fox (x)": [("C:\\fox ", 1), ("x", 1.1)],
    r"a \ b \\ c": [(r"a \ b \\ c", 1)],
    "(a:b)": [("a:b", 1.1)],
    "(16:9 fox)": [("16:9 fox", 1.1)],
    "[red:1.3]": [("red:1.3", 1 / 1.1)],
    "()": [("", 1)],
    "a () b": [("a  b", 1)],
    "(:1.3)": [("", 1)],
    "(日本の:1.2)富士": [("日本の", 1.2), ("富士", 1)],
    "(a\nb:1.2)": [("a\nb", 1.2)],
}  # fmt: skip


@pytest.mark.parametrize("prompt", PARSED)
def test_brackets_by_hand(prompt):
    pieces = parse(prompt)
    assert [text for text, _ in pieces] == [text for text, _ in PARSED[prompt]]
    assert [weight for _, weight in pieces] == pytest.approx([weight for _, weight in PARSED[prompt]], abs=1e-9)
    assert all(weight == 1 for (_, weight), (_, exact) in zip(pieces, PARSED[prompt], strict=True) if exact == 1)


Tree = list[Any]  # of characters, and of groups (bracket, number or None, tree)
LEAF = st.sampled_from("abc ,:()[]\\é日")
GROUP = st.recursive(
    st.lists(LEAF, max_size=4),
    lambda inside: st.lists(
        LEAF
        | st.tuples(st.just("["), st.none(), inside)
        | st.tuples(st.just("("), st.sampled_from([None, 0.5, 1.5, 2.0]), inside),
        max_size=4,
    ),
    max_leaves=12,
)


def written(tree: Tree) -> str:
    """The tree as a prompt."""
    text = ""
    for node in tree:
        if isinstance(node, str):
            text += "\\" + node if node in "()[]\\" else node
        else:
            bracket, number, inside = node
            close = {"[": "]", "(": ")" if number is None else f":{number})"}[bracket]
            text += bracket + written(inside) + close
    return text


def leaves(tree: Tree, weight: float = 1.0) -> Iterator[tuple[str, float]]:
    """Each character with its weight."""
    for node in tree:
        if isinstance(node, str):
            yield node, weight
        else:
            bracket, number, inside = node
            yield from leaves(inside, weight * ({"[": 1 / 1.1, "(": 1.1}[bracket] if number is None else number))


@settings(deadline=None)
@given(GROUP)
def test_brackets_by_grammar(tree):
    """A tree of groups is written down; what is read must have the weight of its place in the tree."""
    prompt, expected = written(tree), [*leaves(tree)]
    if not any(bracket in prompt for bracket in "()[]"):
        return  # there a backslash is one
    if any(weight > 10 for _, weight in expected):
        with pytest.raises(ValueError, match="expected a number from -10 to 10"):
            parse(prompt)
        return
    pieces = parse(prompt)
    found = [(character, weight) for text, weight in pieces for character in text]
    assert [character for character, _ in found] == [character for character, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected], rel=1e-6)
    assert all(a[1] != b[1] for a, b in zip(pieces[:-1], pieces[1:], strict=True))


@given(st.text().filter(lambda text: not any(bracket in text for bracket in "()[]")))
def test_text_without_brackets(text):
    assert parse(text) == [(text, 1.0)] and escape(text) == text


@given(st.text() | st.text("()[]\\:1. a", max_size=30))
def test_escaped_text(text):
    assert parse(escape(text)) == [(text, 1.0)]


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e99", "11", "-11", "1.2.3", ".", "1e400", "Infinity"])
def test_absurd_weights(number):
    with pytest.raises(ValueError, match=r"has the weight .*; expected a number from -10 to 10, such as \(fox:1.3\)"):
        parse(f"a (fox:{number}) in the snow")


def test_unclosed_brackets():
    assert parse("(" * 24 + "fox") == [("fox", pytest.approx(1.1**24))]
    with pytest.raises(ValueError, match="'fox'"):
        parse("(" * 25 + "fox")
    assert parse("[" * 64 + "fox") == [("fox", pytest.approx(1.1**-64))]
    for prompt in ("[" * 65 + "fox", "(fox " * 65, "(:" * 100):
        with pytest.raises(ValueError, match="more than 64 open brackets"):
            parse(prompt)
    for prompt in ("[" * 100_000 + "fox", "(" * 100_000 + "a", "(fox" * 2000):
        with pytest.raises(ValueError, match="expected at most 50000, with up to 2000 per word"):
            parse(prompt)
    with pytest.raises(TypeError, match="prompt must be a str, got int: 7"):
        parse(7)  # type: ignore[arg-type]


def test_weights_in_half_precision():
    z, e = noise(1, 77, 8).half(), noise(77, 8, seed=2).half()
    weights = torch.full((1, 77), 1.1, dtype=torch.float64)
    exact = e.double() + 1.1 * (z.double() - e.double())
    assert (weigh(z, e, weights).double() - exact).abs().max() <= 2**-11 * exact.abs().max()


def test_padding_of_stable_diffusion_2():
    plain = Tokenizer.from_pretrained()
    tokenizer = Tokenizer(plain.vocabulary, list(plain.ranks), pad_token="!")
    ids, _ = rows(read(long_prompt(76), tokenizer), tokenizer)
    assert ids[1].tolist() == [49406, ids[1, 1], 49407] + [0] * 74


def test_warning_of_long_prompts(sd):
    with pytest.warns(UserWarning, match="the prompt has 76 tokens: it is read in 2 chunks"):
        sd.encode_text(long_prompt(76))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.encode_text(long_prompt(75))


def test_too_long_prompts(sd):
    assert quietly(sd, long_prompt(600)).shape == (1, 77 * 8, 16)
    for call in (sd.encode_text, sd.denoise):
        with pytest.raises(ValueError, match=r"5000 tokens, which is 67 chunks of 75; expected at most 8 \(600"):
            call(long_prompt(5000))
    with pytest.raises(ValueError, match="such as"):
        sd.denoise("a fox", negative_prompt="(blurry:99)")
    together = [long_prompt(75 * chunks) for chunks in (3, 5, 7)]
    with pytest.raises(ValueError, match="3, 5, 7 chunks of 75 tokens cannot be drawn together: .* 105 chunks"):
        quietly(sd, together)
    assert quietly(sd, together[1:]).shape == (2, 77 * 35, 16)


@pytest.mark.parametrize("prompt", ["x" * 2001, "(" + "漢" * 2001 + ")", "fox " * 12_501])
def test_prompts_of_absurd_length(prompt):
    with pytest.raises(ValueError, match="characters"):
        parse(prompt)


def test_common_length():
    one, two, three = (noise(1, 77 * k, 4, seed=k) for k in (1, 2, 3))
    found = common_length(one, two, three)
    assert [context.shape[1] for context in found] == [77 * 6] * 3
    for context, alone in zip(found, (one, two, three), strict=True):
        assert torch.equal(context, torch.cat([alone] * (6 * 77 // alone.shape[1]), dim=1))


def test_word_longer_than_a_chunk():
    tokenizer = add_token(Tokenizer.from_pretrained(), "<crowd>", 80)
    chunks = read("fox <crowd> fox", tokenizer)
    assert [len(chunk) for chunk in chunks] == [75, 7]
    assert [number for chunk in chunks for number, _ in chunk][1:-1] == [*range(49408, 49488)]


def test_prompts_of_different_lengths(sd):
    prompts = ["a (fox:1.4)", long_prompt(80), long_prompt(160, 1), "[snow]"]
    against = [long_prompt(90, 2), "", "(cat)", "dog"]
    together = drawn(sd, prompts, negative_prompt=against, seed=4)
    for i, (prompt, negative) in enumerate(zip(prompts, against, strict=True)):
        alone = drawn(sd, prompt, negative_prompt=negative, seed=4 + i)
        assert apart(together[i], alone[0]) <= 1e-4


def test_interpolation_between_prompts_of_different_lengths(sd):
    ends = "a (fox:1.6)", long_prompt(100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        way = sd.interpolate(ends, (4, 9), count=3, negative_prompt=long_prompt(170), **PICTURE)
        for drawn, prompt, seed in ((way[0], ends[0], 4), (way[-1], ends[1], 9)):
            alone = sd(prompt, seed=seed, negative_prompt=long_prompt(170), **PICTURE)
            assert np.abs(np.asarray(drawn, int) - np.asarray(alone, int)).max() <= 1


def test_unknown_words_in_brackets(sd):
    sd = copy.copy(sd)
    sd.text_encoder = copy.deepcopy(sd.text_encoder)
    known = [number for word in ("fox", "a", "snow") for number in sd.tokenizer.encode(word)]
    table = sd.text_encoder.token_embedding.weight
    table[[row for row in range(len(table)) if row not in known]] = 0
    sd.tokenizer = add_word(sd.tokenizer, sd.text_encoder, "<unicorn>", noise(2, 16))
    assert sd.unknown_words(r"a (fox:1.3), [(snow: .5 )], ((<unicorn>)), \(snow\)") == []
    assert sd.unknown_words("a (fox:1.3) (zebra:0.7) [s]now 1.3") == ["zebra", "s", "now", "1", "3"]
