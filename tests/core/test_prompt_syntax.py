"""The web UI's prompt syntax: tables by hand, and pictures drawn step by step with the core."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from torch import Tensor

from minisd import StableDiffusion
from minisd.app.web_drawing import Request, Result, draw
from minisd.features.attention_maps import split_words
from minisd.features.prompt_syntax import plain, split_composition, split_loras, texts_by_step
from minisd.features.prompts import parse, read
from minisd.generate import gaussian_noise, sample
from minisd.pipeline.provenance import Provenance
from minisd.tokenizer import Tokenizer

# The example in the web UI's documentation, at 100 steps.
DOCUMENTED = (
    "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in foreground::0.6]"
    "[ in background:0.25] [shoddy:masterful:0.5]"
)
BEGUN = "fantasy landscape with a"
# Prompt, number of steps, and the text from each step on, counted from 1.
TEXTS: dict[str, tuple[int, dict[int, str]]] = {
    DOCUMENTED: (
        100,
        {
            1: f"{BEGUN} mountain and an oak in foreground shoddy",
            26: f"{BEGUN} lake and an oak in foreground in background shoddy",
            51: f"{BEGUN} lake and an oak in foreground in background masterful",
            61: f"{BEGUN} lake and an oak in background masterful",
            76: f"{BEGUN} lake and a christmas tree in background masterful",
        },
    ),
    "a [fox:cat:0.5]": (10, {1: "a fox", 6: "a cat"}),
    "a [fox:cat:5]": (10, {1: "a fox", 6: "a cat"}),
    "a [fox:cat:.25]": (20, {1: "a fox", 6: "a cat"}),
    "a [cat: 3]": (10, {1: "a ", 4: "a cat"}),
    "a [fox::3]": (10, {1: "a fox", 4: "a "}),
    "a [:cat:3]": (10, {1: "a ", 4: "a cat"}),
    "a [fox:cat:0]": (10, {1: "a cat"}),
    "a [fox:cat:1.0]": (10, {1: "a fox"}),
    "a [fox:cat:99]": (10, {1: "a fox"}),
    "a [b : c : 1] d": (10, {1: "a b  d", 2: "a  c  d"}),
    "a[b:[c:d:2]:1]e": (10, {1: "abe", 2: "ace", 3: "ade"}),
    "a [[[b]]:2]": (10, {1: "a ", 3: "a [[b]]"}),
    "[(a:2):3]": (10, {1: "", 4: "(a:2)"}),
    "[(red fox:1.2):a [cat]:0.5] in (snow)": (4, {1: "(red fox:1.2) in (snow)", 3: "a [cat] in (snow)"}),
    "([fox:cat:0.5]:1.3)": (4, {1: "(fox:1.3)", 3: "(cat:1.3)"}),
    "[fox|cat]": (5, {1: "fox", 2: "cat", 3: "fox", 4: "cat", 5: "fox"}),
    "[a|(b:1.1)]": (3, {1: "a", 2: "(b:1.1)", 3: "a"}),
    "[fe|]male": (3, {1: "female", 2: "male", 3: "female"}),
    "[fe|||]male": (6, {1: "female", 2: "male", 5: "female", 6: "male"}),
    "[[a:b:2]|c]": (4, {1: "a", 2: "c", 3: "b", 4: "c"}),
    "[a|b:c]": (2, {1: "a", 2: "b:c"}),
    "((a][:b:c [d:3]": (10, {1: "((a][:b:c ", 4: "((a][:b:c d"}),
    # no prompt editing
    "a [fox] in (snow:1.2)": (3, {1: "a [fox] in (snow:1.2)"}),
    "a [unbalanced": (3, {1: "a [unbalanced"}),
    "a fox: red | white": (3, {1: "a fox: red | white"}),
    "a [fox: red]": (3, {1: "a [fox: red]"}),
    "a [b:c:d:0.5]": (3, {1: "a [b:c:d:0.5]"}),
    r"a \[fox:cat:0.5\]": (3, {1: r"a \[fox:cat:0.5\]"}),
    r"[a \[b\]:c\|d:2]": (3, {1: r"a \[b\]", 3: r"c\|d"}),
    r"a [fox\:1.2]": (3, {1: r"a [fox\:1.2]"}),
}


@pytest.mark.parametrize("prompt", TEXTS)
def test_texts_of_every_step(prompt):
    steps, changes = TEXTS[prompt]
    expected = [changes[max(first for first in changes if first <= step)] for step in range(1, steps + 1)]
    assert texts_by_step(prompt, steps) == expected


def test_composition_by_hand():
    assert split_composition("a fox AND snow") == [("a fox", 1.0), ("snow", 1.0)]
    assert split_composition("a fox :1.5 AND snow:-0.3 AND (red:1.2)") == [
        ("a fox", 1.5),
        ("snow", -0.3),
        ("(red:1.2)", 1),
    ]
    assert split_composition("a (fox:1.2) AND [a:b:0.5] : 2") == [("a (fox:1.2)", 1.0), ("[a:b:0.5]", 2.0)]
    for prompt in ("fox and snow", "SAND ANDES", "at 12:30", "a fox :1.5"):
        assert split_composition(prompt) == [(prompt, 1.0)]


def test_tags_of_loras_by_hand():
    assert split_loras("a fox, <lora:my style:0.8> snow") == ("a fox,  snow", {"my style": 0.8})
    assert split_loras("<lora:a><lyco:b:-1>fox") == ("fox", {"a": 1.0, "b": -1.0})
    assert split_loras("<lora:a: 0.5 :-.8>fox") == ("fox", {"a": {"text_encoder": 0.5, "unet": -0.8}})
    assert split_loras("a <unicorn> < 3 <b:1>") == ("a <unicorn> < 3 <b:1>", {})
    bad = (
        "<hypernet:a:1>",
        "<lora::1>",
        "<lora:>",
        "<lora:a:x>",
        "<lora:a:1:0.5:16>",
        "<lora:a:1:x>",
        "<lora:a:>",
        "<lora:a:te=1>",
        "<lora:a:0.8:lbw=1,0,1>",
        "<lora:a><lora:a>",
    )
    for tag in bad:
        with pytest.raises(ValueError, match="in the prompt|the prompt has"):
            split_loras(f"a fox {tag}")


def test_everything_a_prompt_may_draw():
    assert parse(plain("a [fox:[cat|dog]:0.5] AND (snow:1.2):2 <lora:x:1>")) == [("a fox cat dog ", 1), ("snow", 1.2)]


def ids(tokenizer: Tokenizer, *words: str) -> list[list[int]]:
    return [tokenizer.encode(word) for word in words]


def test_break_starts_a_chunk():
    tokenizer = Tokenizer.from_pretrained()
    fox, snow = ids(tokenizer, "a fox", "snow")

    def chunks(prompt: str) -> list[list[int]]:
        return [[number for number, _ in chunk] for chunk in read(prompt, tokenizer)]

    assert chunks("a fox BREAK snow") == chunks("a fox\nBREAK\nsnow") == chunks("(a fox BREAK snow:1.2)") == [fox, snow]
    assert [weight for _, weight in read("(a fox BREAK snow:1.2)", tokenizer)[1]] == [1.2]
    assert chunks("a fox BREAK") == [fox] and chunks("BREAK snow") == [[], snow]
    assert chunks("a fox BREAK BREAK snow") == [fox, [], snow]
    assert len(chunks("Break BREAKFAST break")) == 1
    long = "fox " * 80
    assert [len(chunk) for chunk in chunks(f"{long} BREAK snow")] == [75, 5, 1]
    words = split_words("red fox BREAK snow", tokenizer)
    assert [(word.text.strip(), word.rows) for word in words] == [("red", (1,)), ("fox", (2,)), ("snow", (78,))]


@pytest.fixture(scope="module")
def sd(small_model: Path) -> StableDiffusion:
    return StableDiffusion.from_pretrained(small_model, device="cpu")


def test_contexts_of_break_by_hand(sd):
    tokens = (
        [49406, *sd.tokenizer.encode("red fox"), *[49407] * 74],
        [49406, *sd.tokenizer.encode("snow"), *[49407] * 75],
    )
    expected = torch.cat(list(sd.text_encoder(torch.tensor(tokens))))[None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(sd.encode_text("red fox BREAK snow"), expected, atol=1e-6)


def last(steps: Any) -> Tensor:
    *_, step = steps
    return step.latents


def by_hand(
    sd: StableDiffusion,
    prompts: Callable[[int], str],
    negative: Callable[[int], str] = lambda call: "",
    **settings: Any,
) -> Tensor:
    """Draw with the core's loop and one context per UNet call, at guidance 4."""
    from minisd.pipeline.settings import Settings

    chosen = Settings.choose(settings, sd.defaults)
    plan, calls = chosen.sampler_object.plan(sd.schedule, chosen.num_inference_steps), iter(range(1000))

    def denoise(x: Tensor, t: Tensor, progress: float) -> Tensor:
        call = next(calls)
        uncond, cond = (sd.unet(x, t, sd.encode_text(text(call))) for text in (negative, prompts))
        return uncond + 4.0 * (cond - uncond)

    with torch.inference_mode():
        return last(sample(denoise, plan, gaussian_noise([7], (4, 4, 4), "cpu")))


@pytest.mark.parametrize(
    ("prompt", "words", "settings"),
    [
        ("a [fox:snow:0.5]", ["fox"] * 3 + ["snow"] * 3, {"num_inference_steps": 6}),
        ("a [fox:snow:2]", ["fox"] * 2 + ["snow"] * 4, {"num_inference_steps": 6, "sampler": "euler_a"}),
        ("a [fox|snow|red]", ["fox", "snow", "red"] * 2, {"num_inference_steps": 6, "sampler": "ddim"}),
        # two calls per step, and one more call than steps
        ("a [fox:snow:0.5]", ["fox"] * 4 + ["snow"] * 3, {"num_inference_steps": 4, "sampler": "heun"}),
        ("a [fox|snow]", ["fox", "fox", "snow", "snow", "fox"], {"num_inference_steps": 3, "sampler": "dpmpp_sde"}),
        ("a [fox:snow:2]", ["fox"] * 3 + ["snow"] * 2, {"num_inference_steps": 4, "sampler": "pndm"}),
    ],
)
def test_prompt_editing_switches_the_context(sd, prompt, words, settings):
    expected = by_hand(sd, lambda call: f"a {words[call]}", **settings)
    assert torch.allclose(last(sd.denoise(prompt, seed=7, **settings)), expected, atol=1e-4)
    assert not torch.allclose(last(sd.denoise(f"a {words[0]}", seed=7, **settings)), expected, atol=1e-2)


def test_prompt_editing_of_the_negative_prompt_and_in_a_batch(sd):
    expected = by_hand(sd, lambda call: "red", lambda call: "fox" if call < 2 else "snow", num_inference_steps=4)
    prompts, negatives = ["red", "snow"], ["[fox:snow:0.5]", "fox"]
    both = last(sd.denoise(prompts, negative_prompt=negatives, seed=[7, 8], num_inference_steps=4))
    alone = last(sd.denoise("snow", negative_prompt="fox", seed=8, num_inference_steps=4))
    assert torch.allclose(both, torch.cat([expected, alone]), atol=1e-4)


def test_prompt_editing_of_the_negative_prompt_of_given_embeddings(sd):
    expected = by_hand(sd, lambda call: "red", lambda call: "fox" if call < 2 else "snow", num_inference_steps=4)
    embeds = sd.encode_text("red")
    found = sd.denoise("", negative_prompt="[fox:snow:0.5]", prompt_embeds=embeds, seed=7, num_inference_steps=4)
    assert torch.allclose(last(found), expected, atol=1e-4)


def test_prompt_editing_counts_the_steps_that_run(sd):
    image = torch.zeros(1, 3, 32, 32)
    edited = last(sd.denoise("[fox:snow:0.5]", image, strength=0.5, seed=7, num_inference_steps=8))
    assert edited.isfinite().all()
    texts = sd._request("[fox:snow:0.5]", image, None, strength=0.5, num_inference_steps=8).texts
    assert [prompts for prompts, _ in texts] == [("fox",)] * 2 + [("snow",)] * 2


def composed(sd: StableDiffusion, parts: Sequence[tuple[str, float]], scale: float) -> Tensor:
    plan = sd.defaults.sampler.plan(sd.schedule, 3)

    def denoise(x: Tensor, t: Tensor, progress: float) -> Tensor:
        base = sd.unet(x, t, sd.encode_text(""))
        return base + scale * sum(weight * (sd.unet(x, t, sd.encode_text(text)) - base) for text, weight in parts)

    with torch.inference_mode():
        return last(sample(denoise, plan, gaussian_noise([7], (4, 4, 4), "cpu")))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_composition_adds_predictions(sd, scale):
    expected = composed(sd, [("a fox", 1.0), ("snow", -0.5)], scale)
    found = last(sd.denoise(["a fox AND snow :-0.5", "red"], seed=[7, 8], guidance_scale=scale))
    alone = last(sd.denoise("red", seed=8, guidance_scale=scale))
    assert torch.allclose(found, torch.cat([expected, alone]), atol=1e-4)


@pytest.fixture
def folder(sd: StableDiffusion, tmp_path: Path) -> Path:
    """A folder with the LoRAs "style" and, in a subfolder, "other", of a convolution and a linear layer."""
    generator, text = torch.Generator().manual_seed(3), "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    linear = sd.text_encoder.get_submodule(text.partition(".")[2])
    for name in ("style", "more/other"):
        path, weights = tmp_path / f"loras/{name}.safetensors", {}
        for layer, weight in (("unet.conv_in", sd.unet.conv_in.weight), (text, linear.weight)):
            for factor, shape in (("A", (2, *weight.shape[1:])), ("B", (len(weight), 2, *[1] * (weight.dim() - 2)))):
                weights[f"{layer}.lora_{factor}.weight"] = 0.3 * torch.randn(shape, generator=generator)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, path)
    return tmp_path / "loras"


def test_lora_of_a_prompt_equals_a_loaded_one(small_model, folder):
    sd = StableDiffusion.from_pretrained(small_model, device="cpu", lora_folder=folder)
    before = last(sd.denoise("a fox", seed=7))
    steps = sd.denoise("a fox <lora:style:0.8><lora:other:-0.5>", seed=7)
    first = next(steps)
    interleaved = last(sd.denoise("a fox", seed=7))  # between two steps of the other run
    tagged = [first.latents, *(step.latents for step in steps)][-1]
    assert torch.equal(interleaved, before) and torch.equal(last(sd.denoise("a fox", seed=7)), before)
    assert not sd.adapters.loras and not torch.allclose(tagged, before, atol=1e-2)
    sd.load_lora(folder / "style.safetensors", weight=0.8)
    sd.load_lora(folder / "more/other.safetensors", weight=-0.5)
    assert torch.allclose(last(sd.denoise("a fox", seed=7)), tagged, atol=1e-5)
    # a tag overrides the weight of a LoRA that is loaded, for this call only
    sd.set_adapters({"style": 0.1, "other": -0.5})
    assert torch.allclose(last(sd.denoise("a fox <lora:style:0.8>", seed=7)), tagged, atol=1e-5)
    assert sd.adapters.weights == {"style": 0.1, "other": -0.5}


def test_weights_for_the_text_encoder_and_the_unet(small_model, folder):
    sd = StableDiffusion.from_pretrained(small_model, device="cpu", lora_folder=folder)
    tagged = last(sd.denoise("a fox <lora:style:0.5:-0.8>", seed=7))
    sd.load_lora(folder / "style.safetensors", weight={"text_encoder": 0.5, "unet": -0.8})
    assert torch.allclose(last(sd.denoise("a fox", seed=7)), tagged, atol=1e-5)
    sd.set_adapters({"style": 0.5})
    assert torch.allclose(last(sd.denoise("a fox <lora:style:0.5:-0.8>", seed=7)), tagged, atol=1e-5)
    assert not torch.allclose(last(sd.denoise("a fox", seed=7)), tagged, atol=1e-2)


FOREIGN = {
    "{red|white} fox": "'{red|white}'", "a __color__ fox": "'__color__'", "__sub/color-*__": "__sub/color-*__",
    "fox, embedding:bad-hands, snow": "'embedding:bad-hands'", "(embedding:bad:1.2)": "'embedding:bad'",
    "<wildcard:color> fox": "'<wildcard:color>'", "<LORA:x:1>": "'<LORA:x:1>'", "fox++ in snow": "x++",
    "(red fox)+, snow": "x)+", "(red fox)--": "x)--", "{{fox}}": "'{fox}'", "{fox}": "'{fox}'",
    '("fox", "snow").blend(1, 0.5)': ").blend(", "fox ADDCOL snow": "'ADDCOL'", "fox AND_PERP snow": "'AND_PERP'",
    "fox --ar 16:9": "'--ar'",
}  # fmt: skip


@pytest.mark.parametrize("prompt", FOREIGN)
def test_syntax_of_other_programs_is_named(sd, prompt):
    for texts in ({"prompt": prompt}, {"prompt": "fox", "negative_prompt": prompt}):
        with pytest.warns(UserWarning, match="it is drawn as words") as caught:
            sd.denoise(**texts)  # before anything is drawn
        assert FOREIGN[prompt] in str(caught[0].message)


@pytest.mark.parametrize("prompt", ["a (red-haired) fox", "a well-lit C + D", "snake_case __", "(a)-b", "ADD -- b"])
@pytest.mark.filterwarnings("error")
def test_usual_prompts_are_not_foreign(sd, prompt):
    sd.denoise(prompt)


def test_invalid_prompts_are_refused_before_drawing(sd, small_model, folder):
    with pytest.raises(
        ValueError, match="names the LoRA 'style'; load it, or pass its folder as lora_folder or --lora-folder"
    ):
        sd.denoise("a fox <lora:style:1>")
    other = StableDiffusion.from_pretrained(small_model, device="cpu", lora_folder=folder)
    with pytest.raises(ValueError, match="'styel', which is not in .*: other, style"):
        other.denoise("a fox <lora:styel:1>")
    (folder / "style.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"'style', and .* has several: style.pt, style.safetensors; name its folder"):
        other.denoise("a fox <lora:style:1>")
    (folder / "style.pt").unlink()
    with pytest.raises(ValueError, match="name the same LoRAs"):
        other.denoise(["a fox <lora:style:1>", "a fox"])
    for negative in ("<lora:style:1>", "fox AND snow"):
        with pytest.raises(ValueError, match="expected them in the prompt only"):
            other.denoise("a fox", negative_prompt=negative)
    with pytest.raises(ValueError, match="weight"):
        other.denoise("[fox:(snow:99):0.5]")
    for prompt in ("[fox:snow:5]", "[fox|snow]", "a AND b", "<lora:style:1>"):
        with pytest.raises(ValueError, match="no single encoding"):
            other.encode_text(prompt)
    (folder / "bad.safetensors").write_bytes(b"not a LoRA")
    with pytest.raises(ValueError, match="bad.safetensors"):
        other.denoise("a fox <lora:bad:1>")


PROMPT = "a [fox:snow:0.5] BREAK red <lora:style:0.8>"


def test_syntax_on_the_command_line_in_files_in_like_and_on_the_page(run, small_model, folder):
    sd = StableDiffusion.from_pretrained(small_model, device="cpu", lora_folder=folder)
    expected = np.asarray(sd(PROMPT, seed=7))
    loras = ("--lora-folder", str(folder))
    assert run("generate", PROMPT, "--seed", "7", *loras, "-o", "first.png")[0] == 0
    assert np.array_equal(np.asarray(Image.open("first.png")), expected)
    assert run("generate", "--like", "first.png", *loras, "-o", "again.png")[0] == 0
    assert np.array_equal(np.asarray(Image.open("again.png")), expected)
    Path("prompts.txt").write_text(f"{PROMPT}\na fox\n")
    assert run("generate", "--prompts", "prompts.txt", "--seed", "7", *loras, "-o", "out/")[0] == 0
    first, second = sorted(Path("out").glob("*.png"))
    assert np.abs(np.asarray(Image.open(first), int) - expected).max() <= 1
    assert np.abs(np.asarray(Image.open(second), int) - np.asarray(sd("a fox", seed=7), int)).max() <= 1
    *_, result = draw(sd, Provenance.of(sd, str(small_model)), Request(PROMPT, seed="7"))
    assert isinstance(result, Result) and np.array_equal(np.asarray(result.picture), expected)
    assert [word.text.strip() for word in result.words] == ["a", "snow", "red"]
    # another program's picture
    info = PngInfo()
    info.add_text(
        "parameters", f"{PROMPT}<hypernet:x:1>\nSteps: 3, Sampler: DPM++ 2M Karras, CFG scale: 4, Seed: 7, Size: 32x32"
    )
    Image.open("first.png").save("other.png", pnginfo=info)
    assert run("generate", "--like", "other.png", *loras, "-o", "like.png")[0] == 0
    assert np.array_equal(np.asarray(Image.open("like.png")), expected)
    code, _, err = run("generate", PROMPT, "-o", "none.png")
    assert code == 2 and "names the LoRA 'style'" in err and "lora_folder" in err and not Path("none.png").exists()
