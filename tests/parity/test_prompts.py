"""Contexts of weighted and long prompts, against compel and transformers."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from checkpoints import TOKENIZER
from compel import Compel
from compel.embeddings_provider import SplitLongTextMode
from models import TOLERANCE, difference, long_prompt, noise
from torch import Tensor
from transformers import CLIPTokenizer

from minisd import StableDiffusion, Tokenizer
from minisd.features.prompts import escape, read, rows
from minisd.features.textual_inversion import add_word

PICTURE: dict[str, Any] = {"num_inference_steps": 3, "sampler": "ddim", "guidance_scale": 3.0}


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
def test_weights_of_one(ours, prompt):
    plain = prompt.translate(str.maketrans("", "", "()[]:1"))
    with torch.inference_mode():
        expected = ours.text_encoder(ours.tokenizer([plain, "a cat"]))
    assert torch.equal(ours.encode_text([prompt, "a cat"]), expected)


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
def test_weights_from_one_on(ours, compel, prompt):
    expected = compel(WEIGHTED[prompt])
    assert difference(ours.encode_text(prompt), expected) <= TOLERANCE
    assert difference(quietly(ours, escape(WEIGHTED[prompt])), expected) > 1e-2  # the weight matters


@pytest.mark.parametrize("weight", [0.9, 0.5, 0.0, -1.0])
def test_weights_below_one_by_hand(ours, models, weight):
    """compel does something else there: its contexts without the word are mixed in."""
    tokenizer, encoder = CLIPTokenizer.from_pretrained(TOKENIZER), models[1].text_encoder
    ids = tokenizer(["a red fox in the snow", ""], padding="max_length", return_tensors="pt").input_ids
    z, e = encoder(ids).last_hidden_state
    expected = z.clone()
    for place in (2, 3):  # red, fox; the start is 0, "a" is 1
        expected[place] = e[place] + weight * (z[place] - e[place])
    found = ours.encode_text(f"a (red fox:{weight}) in the snow")[0]
    assert difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("tokens", [75, 76, 150, 151, 300])
def test_long_prompts(ours, compel, tokens):
    prompt, chunks = long_prompt(tokens), math.ceil(tokens / 75)
    assert quietly(ours, prompt).shape == (1, 77 * chunks, 32)
    assert difference(quietly(ours, prompt), compel(prompt)) <= TOLERANCE


def test_weights_across_chunks(ours, compel):
    some = long_prompt(70), long_prompt(10, 3), long_prompt(90, 5)
    expected = compel("{} ({})1.6 {}".format(*some))
    assert expected.shape == (1, 77 * 3, 32)
    assert difference(quietly(ours, "{} ({}:1.6) {}".format(*some)), expected) <= TOLERANCE


def test_token_rows():
    reference, tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER), Tokenizer.from_pretrained()
    halves = long_prompt(75), "a dog"
    ids, weights = rows(read(f"({halves[0]}:2) {halves[1]}", tokenizer), tokenizer)
    expected = reference(halves, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ids, expected) and weights.tolist() == [[1.0] + [2.0] * 75 + [1.0], [1.0] * 77]


@torch.inference_mode()
def test_attention_over_repeated_contexts(models):
    """Asked of diffusers' UNet and of ours; padding with the empty prompt instead is another context."""
    x, t, context = noise(1, 4, 8, 8), torch.tensor(400), noise(1, 77, 32, seed=3)
    for unet in (lambda c: models[0].unet(x, t, c), lambda c: models[1].unet(x, t, c).sample):
        alone = unet(context)
        assert difference(unet(context.repeat(1, 3, 1)), alone) <= TOLERANCE
        assert difference(unet(torch.cat([context, models[0].encode_text("")], dim=1)), alone) > 1e-2


def test_added_words_in_weights_and_at_ends_of_chunks(ours, models):
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


def last(steps: Iterator[Any]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        *_, step = steps
    return step.latents


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_weighted_long_prompts_in_the_pipeline(ours, models, compel):
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


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip_of_both_prompts(ours, models, monkeypatch, clip_skip):
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
