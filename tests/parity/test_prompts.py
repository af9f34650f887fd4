"""Prompts: their brackets by hand and by grammar, their contexts against compel and transformers."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import SMALL, TOKENIZER, make_parts, make_pipeline, write_folder
from compel import Compel
from compel.embeddings_provider import SplitLongTextMode
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import TOLERANCE, difference, noise
from torch import Tensor
from transformers import CLIPTokenizer

from minisd.app import cli
from minisd.features.prompts import common_length, escape, parse, read, rows, weigh
from minisd.features.textual_inversion import add_token, add_word
from minisd.guidance import Guidance
from minisd.pipeline.stable_diffusion import StableDiffusion
from minisd.tokenizer import Tokenizer

WORDS = ("fox", "cat", "dog", "tree", "house", "snow", "castle", "moon", "river", "stone", "cloud", "bird", "hill")
PICTURE: dict[str, Any] = {"num_inference_steps": 3, "sampler": "ddim", "guidance_scale": 3.0}


def long_prompt(tokens: int, first: int = 0) -> str:
    """So many words that are one token each."""
    return " ".join(WORDS[(first + i * i) % len(WORDS)] for i in range(tokens))


# Brackets

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
def test_brackets_by_hand(prompt: str) -> None:
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
def test_brackets_by_their_grammar(tree: Tree) -> None:
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
def test_text_without_brackets_comes_back_whole(text: str) -> None:
    assert parse(text) == [(text, 1.0)] and escape(text) == text


@given(st.text() | st.text("()[]\\:1. a", max_size=30))
def test_escaped_text_comes_back(text: str) -> None:
    assert parse(escape(text)) == [(text, 1.0)]


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e99", "11", "-11", "1.2.3", ".", "1e400", "Infinity"])
def test_absurd_weights_are_refused(number: str) -> None:
    with pytest.raises(ValueError, match=r"has the weight .*; expected a number from -10 to 10, such as \(fox:1.3\)"):
        parse(f"a (fox:{number}) in the snow")


def test_brackets_without_end_are_read_or_refused_soon() -> None:
    assert parse("(" * 24 + "fox") == [("fox", pytest.approx(1.1**24))]
    for prompt in ("(" * 25 + "fox", "(fox" * 2000, "(" * 100_000 + "a"):
        with pytest.raises(ValueError, match="'.*fox'|'a'"):
            parse(prompt)
    assert parse("[" * 100_000 + "fox") == [("fox", 0.0)]
    with pytest.raises(TypeError, match="expected the prompt as a str, got int: 7"):
        parse(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", ["x" * 2001, "(" + "漢" * 2001 + ")", "fox " * 12_501])
def test_prompts_of_absurd_length_are_refused_before_they_are_split(prompt: str) -> None:
    with pytest.raises(ValueError, match="characters"):
        parse(prompt)


# Contexts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[StableDiffusion, StableDiffusionPipeline]:
    """One small random model twice, in float64: ours and diffusers'."""
    parts = make_parts(SMALL, scale=1.2)
    folder = write_folder(tmp_path_factory.mktemp("prompts") / "model", parts)
    sd = StableDiffusion.from_pretrained(folder, device="cpu", dtype=torch.float64)
    pipe = make_pipeline(parts).to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    return sd, pipe


@pytest.fixture
def ours(models: Any) -> StableDiffusion:
    return models[0]


@pytest.fixture
def compel(models: Any) -> Compel:
    return Compel(
        CLIPTokenizer.from_pretrained(TOKENIZER),
        models[1].text_encoder,
        dtype_for_device_getter=lambda device: torch.float64,
        truncate_long_prompts=False,
        split_long_text_mode=SplitLongTextMode.BRUTAL,
    )


def quietly(sd: StableDiffusion, prompts: str | list[str], clip_skip: int = 1) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sd.encode_text(prompts, clip_skip)


@pytest.mark.parametrize("prompt", ["", "a fox in the snow", "(a fox:1) in [(the)] snow", long_prompt(75)])
def test_weights_of_one_change_no_bit(ours: StableDiffusion, prompt: str) -> None:
    plain = prompt.translate(str.maketrans("", "", "()[]:1"))
    with torch.inference_mode():
        expected = ours.text_encoder(ours.tokenizer([plain, "a cat"]))
    assert torch.equal(ours.encode_text([prompt, "a cat"]), expected)


def test_no_prompts_are_refused(ours: StableDiffusion) -> None:
    with pytest.raises(TypeError, match="non-empty list"):
        ours.encode_text([])


# Ours, and the same in compel's own syntax; its brackets end a word as ours do.
WEIGHTED = {
    "a (fox:1.5) in the snow": "a (fox)1.5 in the snow",
    "a (red fox:1.3), (blue:2) snow": "a (red fox)1.3, (blue)2 snow",
    "(everything:1.1)": "(everything)1.1",
    "a (photograph of stylegan:1.7)": "a (photograph of stylegan)1.7",
    "((fox)) (cat) dog": "(fox)1.21 (cat)1.1 dog",
    "(a (red:1.5) fox:2) x": "(a)2 (red)3 (fox)2 x",
}


@pytest.mark.parametrize("prompt", WEIGHTED)
def test_weights_from_one_on_against_compel(ours: StableDiffusion, compel: Compel, prompt: str) -> None:
    expected = compel(WEIGHTED[prompt])
    assert difference(ours.encode_text(prompt), expected) <= TOLERANCE
    assert difference(quietly(ours, escape(WEIGHTED[prompt])), expected) > 1e-2  # the weight matters


@pytest.mark.parametrize("weight", [0.9, 0.5, 0.0, -1.0])
def test_weights_below_one_by_hand(ours: StableDiffusion, models: Any, weight: float) -> None:
    """compel does something else there: its contexts without the word are mixed in."""
    tokenizer, encoder = CLIPTokenizer.from_pretrained(TOKENIZER), models[1].text_encoder
    ids = tokenizer(["a red fox in the snow", ""], padding="max_length", return_tensors="pt").input_ids
    z, e = encoder(ids).last_hidden_state
    expected = z.clone()
    for place in (2, 3):  # red, fox; the start is 0, "a" is 1
        expected[place] = e[place] + weight * (z[place] - e[place])
    found = ours.encode_text(f"a (red fox:{weight}) in the snow")[0]
    assert difference(found, expected) <= TOLERANCE
    others = [0, 1, *range(4, 77)]
    assert torch.equal(found[others], ours.encode_text("a red fox in the snow")[0][others])


def test_half_precision_is_weighted_in_single() -> None:
    z, e = noise(1, 77, 8).half(), noise(77, 8, seed=2).half()
    weights = torch.full((1, 77), 1.1, dtype=torch.float64)
    exact = e.double() + 1.1 * (z.double() - e.double())
    assert (weigh(z, e, weights).double() - exact).abs().max() <= 2**-11 * exact.abs().max()


@pytest.mark.parametrize("tokens", [75, 76, 150, 151, 300])
def test_long_prompts_against_compel(ours: StableDiffusion, compel: Compel, tokens: int) -> None:
    prompt, chunks = long_prompt(tokens), math.ceil(tokens / 75)
    assert quietly(ours, prompt).shape == (1, 77 * chunks, 32)
    assert difference(quietly(ours, prompt), compel(prompt)) <= TOLERANCE


def test_weights_across_chunks_against_compel(ours: StableDiffusion, compel: Compel) -> None:
    some = long_prompt(70), long_prompt(10, 3), long_prompt(90, 5)
    expected = compel("{} ({})1.6 {}".format(*some))
    assert expected.shape == (1, 77 * 3, 32)
    assert difference(quietly(ours, "{} ({}:1.6) {}".format(*some)), expected) <= TOLERANCE


def test_rows_are_those_of_transformers() -> None:
    reference, tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER), Tokenizer.from_pretrained()
    halves = long_prompt(75), "a dog"
    ids, weights = rows(read(f"({halves[0]}:2) {halves[1]}", tokenizer), tokenizer)
    expected = reference(halves, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ids, expected) and weights.tolist() == [[1.0] + [2.0] * 75 + [1.0], [1.0] * 77]


def test_stable_diffusion_2_pads_chunks_with_0() -> None:
    plain = Tokenizer.from_pretrained()
    tokenizer = Tokenizer(plain.vocabulary, list(plain.ranks), pad_token="!")
    ids, _ = rows(read(long_prompt(76), tokenizer), tokenizer)
    assert ids[1].tolist() == [49406, ids[1, 1], 49407] + [0] * 74


def test_a_long_prompt_says_so(ours: StableDiffusion) -> None:
    with pytest.warns(UserWarning, match="the prompt has 76 tokens: it is read in 2 chunks"):
        ours.encode_text(long_prompt(76))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.encode_text(long_prompt(75))


def test_too_long_prompts_are_refused_before_any_work(ours: StableDiffusion) -> None:
    assert quietly(ours, long_prompt(600)).shape == (1, 77 * 8, 32)
    for call in (ours.encode_text, ours.denoise):
        with pytest.raises(ValueError, match=r"10000 tokens, which is 134 chunks of 75; expected at most 8 \(600"):
            call(long_prompt(10_000))
    with pytest.raises(ValueError, match="such as"):
        ours.denoise("a fox", negative_prompt="(blurry:99)")
    together = [long_prompt(75 * chunks) for chunks in (3, 5, 7)]
    with pytest.raises(ValueError, match="3, 5, 7 chunks of 75 tokens cannot be drawn together: .* 105 chunks"):
        quietly(ours, together)
    assert quietly(ours, together[1:]).shape == (2, 77 * 35, 32)


def test_common_length_repeats_whole_contexts() -> None:
    one, two, three = (noise(1, 77 * k, 4, seed=k) for k in (1, 2, 3))
    found = common_length(one, two, three)
    assert [context.shape[1] for context in found] == [77 * 6] * 3
    for context, alone in zip(found, (one, two, three), strict=True):
        assert torch.equal(context, torch.cat([alone] * (6 * 77 // alone.shape[1]), dim=1))


@torch.inference_mode()
def test_attention_sees_no_difference_in_repeated_contexts(models: Any) -> None:
    """Asked of diffusers' UNet and of ours; padding with the empty prompt instead is another context."""
    x, t, context = noise(1, 4, 8, 8), torch.tensor(400), noise(1, 77, 32, seed=3)
    for unet in (lambda c: models[0].unet(x, t, c), lambda c: models[1].unet(x, t, c).sample):
        alone = unet(context)
        assert difference(unet(context.repeat(1, 3, 1)), alone) <= TOLERANCE
        assert difference(unet(torch.cat([context, models[0].encode_text("")], dim=1)), alone) > 1e-2


# Words of several vectors


def test_added_words_in_weights_and_at_the_ends_of_chunks(ours: StableDiffusion, models: Any) -> None:
    sd = copy.copy(ours)
    sd.text_encoder = copy.deepcopy(ours.text_encoder)
    sd.tokenizer = add_word(sd.tokenizer, sd.text_encoder, "<unicorn>", noise(3, 32))
    word, table = [49408, 49409, 49410], sd.tokenizer.vocabulary
    fox = table["fox</w>"]
    chunks = read("a (<unicorn> fox:1.5) <UNICORN>", sd.tokenizer)
    assert chunks == [[(table["a</w>"], 1.0), *((each, 1.5) for each in (*word, fox)), *((each, 1.0) for each in word)]]
    for before, cut in ((72, 75), (73, 73), (74, 74), (75, 75)):  # 72 words and three vectors fill a chunk
        chunks = read("fox " * before + "(<unicorn>:1.2) fox", sd.tokenizer)
        assert [len(chunk) for chunk in chunks] == [cut, before + 4 - cut]
        tokens = [number for chunk in chunks for number, _ in chunk]
        assert tokens == [fox] * before + word + [fox]
        assert [weight for chunk in chunks for _, weight in chunk] == [1.0] * before + [1.2] * 3 + [1.0]
    # the context of the chunks is that of transformers' encoder with the longer table
    encoder = copy.deepcopy(models[1].text_encoder)
    encoder.resize_token_embeddings(49411, mean_resizing=False)
    encoder.get_input_embeddings().weight.data[49408:] = noise(3, 32)
    ids = torch.tensor([[49406, *[fox] * 74] + [49407] * 2, [49406, *word, fox] + [49407] * 72])
    with torch.inference_mode():
        expected = encoder(ids).last_hidden_state.flatten(0, 1)[None]
    assert difference(quietly(sd, "fox " * 74 + "<unicorn> fox"), expected) <= TOLERANCE


def test_a_word_longer_than_a_chunk_is_cut() -> None:
    tokenizer = add_token(Tokenizer.from_pretrained(), "<crowd>", 80)
    chunks = read("fox <crowd> fox", tokenizer)
    assert [len(chunk) for chunk in chunks] == [75, 7]
    assert [number for chunk in chunks for number, _ in chunk][1:-1] == [*range(49408, 49488)]


# The pipeline


def last(steps: Iterator[Any]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        *_, step = steps
    return step.latents


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_weighted_long_prompts_draw_as_diffusers_does(ours: StableDiffusion, models: Any, compel: Compel) -> None:
    latents, (first, second) = noise(1, 4, 8, 8), (long_prompt(80), long_prompt(70, 2))
    mine = last(
        ours.denoise(f"{first} (fox:1.5)", negative_prompt=f"(cat:2) {second} dog, house ,", latents=latents, **PICTURE)
    )
    expected = models[1](
        prompt_embeds=compel(f"{first} (fox)1.5"),
        negative_prompt_embeds=compel(f"(cat)2 {second} dog, house ,").repeat(1, 2, 1),
        latents=latents,
        num_inference_steps=3,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    assert apart(mine, expected.float()) <= 1e-4
    other = last(ours.denoise(f"{first} fox", negative_prompt=second, latents=latents, **PICTURE))
    assert apart(other, expected.float()) > 1e-2


def test_prompts_of_different_lengths_are_drawn_as_alone(ours: StableDiffusion) -> None:
    prompts = ["a (fox:1.4)", long_prompt(80), long_prompt(160, 1), "[snow]"]
    against = [long_prompt(90, 2), "", "(cat)", "dog"]
    together = last(ours.denoise(prompts, negative_prompt=against, seed=4, **PICTURE))
    for i, (prompt, negative) in enumerate(zip(prompts, against, strict=True)):
        alone = last(ours.denoise(prompt, negative_prompt=negative, seed=4 + i, **PICTURE))
        assert apart(together[i], alone[0]) <= 1e-4


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip_is_for_both_prompts(
    ours: StableDiffusion, models: Any, monkeypatch: pytest.MonkeyPatch, clip_skip: int
) -> None:
    seen: list[Tensor] = []
    forward = ours.unet.forward
    monkeypatch.setattr(ours.unet, "forward", lambda x, t, c: seen.append(c) or forward(x, t, c))
    next(ours.denoise("a (fox:1.5)", negative_prompt="a [cat]", seed=0, clip_skip=clip_skip, **PICTURE))
    tokenizer, encoder = CLIPTokenizer.from_pretrained(TOKENIZER), models[1].text_encoder
    ids = tokenizer(["a cat", "a fox", ""], padding="max_length", return_tensors="pt").input_ids
    with torch.inference_mode():
        hidden = encoder(ids, output_hidden_states=True).hidden_states[-clip_skip]
        negative, positive, empty = encoder.final_layer_norm(hidden)
        negative[2] = empty[2] + (negative[2] - empty[2]) / 1.1
        positive[2] = empty[2] + (positive[2] - empty[2]) * 1.5
    assert difference(seen[0], torch.stack([negative, positive])) <= 1e-8  # weights are kept to nine places


def test_interpolation_between_prompts_of_different_lengths(ours: StableDiffusion) -> None:
    ends = "a (fox:1.6)", long_prompt(100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        way = ours.interpolate(ends, (4, 9), count=3, negative_prompt=long_prompt(170), **PICTURE)
        for drawn, prompt, seed in ((way[0], ends[0], 4), (way[-1], ends[1], 9)):
            alone = ours(prompt, seed=seed, negative_prompt=long_prompt(170), **PICTURE)
            assert np.abs(np.asarray(drawn, int) - np.asarray(alone, int)).max() <= 1
    with pytest.raises(ValueError, match=r"prompt_embeds has shape \(1, 100, 32\); expected \(1, 77, 32\)"):
        ours.denoise("a fox", prompt_embeds=torch.zeros(1, 100, 32))


# Guidance per image

SCALES = [0.0, 1.0, 3.0, 7.5, -1.0]


@pytest.mark.parametrize(
    "choices", [{}, {"guidance_rescale": 0.7}, {"guidance_interval": (0.3, 0.9)}], ids=["plain", "rescale", "interval"]
)
@pytest.mark.parametrize("embeds", [False, True], ids=["prompts", "embeds"])
def test_a_scale_for_each_image_is_the_same_as_one_by_one(
    ours: StableDiffusion, choices: dict[str, Any], embeds: bool
) -> None:
    choices = {"num_inference_steps": 3, "sampler": "ddim", "negative_prompt": "a cat"} | choices
    prompts = ["a fox", "a dog", "a tree", "(snow)", "a house"]

    def drawn(some: list[str], **more: Any) -> Tensor:
        given = {"prompt_embeds": ours.encode_text(some)} if embeds else {}
        return last(ours.denoise(some, **choices, **given, **more))

    together = drawn(prompts, seed=2, guidance_scale=SCALES)
    for i, (prompt, scale) in enumerate(zip(prompts, SCALES, strict=True)):
        assert apart(together[i], drawn([prompt], seed=2 + i, guidance_scale=scale)[0]) <= 1e-4
    assert apart(together, drawn(prompts, seed=2, guidance_scale=[3.0] * 5)) > 1e-2


def test_scales_of_zero_and_one_alone_call_the_unet_once_per_image(
    ours: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = ours.unet.forward
    monkeypatch.setattr(ours.unet, "forward", lambda x, t, c: seen.append(len(x)) or forward(x, t, c))
    for scales, images in (([0, 1], 2), ([1, 1], 2), ([0, 0], 2), ([0, 2], 4), (2, 4)):
        next(ours.denoise(["a fox", "a cat"], seed=0, guidance_scale=scales, num_inference_steps=2))
        assert seen.pop() == images


def test_scales_by_hand() -> None:
    negative, positive = torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]], [[[2.0, 4.0]]]])
    assert Guidance((2.0, 0.5)).combine(negative, positive).flatten().tolist() == [2, 6, 1, 2]
    assert Guidance(3.0).scales(2) == (3.0, 3.0)


def test_wrong_numbers_of_scales_are_refused(ours: StableDiffusion) -> None:
    with pytest.raises(ValueError, match="3 guidance scales for 2 images; give one number, or one for each"):
        ours(["a fox", "a cat"], guidance_scale=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="2 guidance scales for 1 images"):
        ours("a fox", guidance_scale=[1.0, 2.0])
    with pytest.raises(ValueError, match="guidance_scale=nan; expected a finite number"):
        ours(["a fox", "a cat"], guidance_scale=[1.0, float("nan")])
    drawn = ours("a fox", num_images_per_prompt=2, guidance_scale=[1.0, 5.0], seed=0, num_inference_steps=1)
    assert len(drawn) == 2


# The command


def test_unknown_words_are_not_brackets_and_numbers(ours: StableDiffusion) -> None:
    sd = copy.copy(ours)
    sd.text_encoder = copy.deepcopy(ours.text_encoder)
    known = [number for word in ("fox", "a", "snow") for number in sd.tokenizer.encode(word)]
    table = sd.text_encoder.token_embedding.weight
    table[[row for row in range(len(table)) if row not in known]] = 0
    sd.tokenizer = add_word(sd.tokenizer, sd.text_encoder, "<unicorn>", noise(2, 32))
    assert sd.unknown_words(r"a (fox:1.3), [(snow: .5 )], ((<unicorn>)), \(snow\)") == []
    assert sd.unknown_words("a (fox:1.3) (zebra:0.7) [s]now 1.3") == ["zebra", "s", "now", "1", "3"]


def test_the_command_reads_weights(small_model: Any, tmp_path: Any, capsys: Any) -> None:
    def run(prompt: str, name: str) -> tuple[int, str]:
        choices = ["--model", str(small_model), "--seed", "1", "--output", str(tmp_path / name)]
        code = cli.main(["generate", prompt, *choices, "--steps", "1", "-n", "2"])
        return code, capsys.readouterr().err

    assert run("red (fox:1.4)", "weighted.png")[0] == run("red fox", "plain.png")[0] == 0
    assert (tmp_path / "weighted-1.png").read_bytes() != (tmp_path / "plain-1.png").read_bytes()
    code, err = run("a (fox:99)", "none.png")
    assert code == 2 and "has the weight 99; expected a number from -10 to 10" in err
    assert cli.main(["generate", "--help"]) == 0 and "(words:1.3)" in capsys.readouterr().out
