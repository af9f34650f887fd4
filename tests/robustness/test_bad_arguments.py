"""Bad arguments to everything public, one at a time: refused by an error of a documented kind, before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import write_adapters
from PIL import Image

from minisd import Sampler, StableDiffusion

REFUSED = (TypeError, ValueError, FloatingPointError)
NAN, INF = float("nan"), float("inf")


def with_nan(*shape: int) -> torch.Tensor:
    x = torch.zeros(shape)
    x.view(-1)[-1] = NAN
    return x


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURE = picture(32, 24)
MASK = np.zeros((24, 32), np.uint8)
MASK[8:16, 8:24] = 255
GENERATOR = torch.Generator().manual_seed(0)
LATENTS = torch.randn(1, 4, 4, 4, generator=GENERATOR)
EMBEDS = torch.randn(1, 77, 16, generator=GENERATOR)
IMAGES = torch.rand(1, 3, 24, 32, generator=GENERATOR) * 2 - 1

SIDES = [0, -8, 12, 33, 520, 10**6, 2**70, 64.0, "64", True, np.True_, NAN, [32], torch.tensor(32.0), b"32", object()]
BAD: dict[str, list[Any]] = {
    "prompt": [
        "fox " * 10_000, "(fox:nan)", "(fox:99)", [], (), 7, None, b"fox", [None], [["fox"]], {"fox"}, "\ud800",
        ["fox", "a\udfffb"], [b"fox"], True, NAN,
    ],
    "negative_prompt": [None, 7, [], ["a", "b", "c"], [None], b"x", "\udc00"],
    "num_inference_steps": [0, -1, 10**6, 1001, 1.5, 2.0, True, "3", NAN, [3], 2**70, b"1"],
    "guidance_scale": [
        NAN, INF, -INF, "7", 1e30, 10**400, True, [7] * 5, 1 + 1j, torch.zeros(3), np.zeros(2), b"7", [NAN],
    ],
    "guidance_rescale": [-0.1, 1.1, NAN, "x", True, [0.5]],
    "guidance_interval": [(0.8, 0.2), (0, 2), (0,), "01", 5, (NAN, 1), (0, "1"), (0, 0.5, 1), {0, 1}],
    "feature_reuse": [
        (0, 1), (2, 7), (2, 0), (2,), (2, 1, 1), 3, "21", (2.0, 1), (True, 1), ("2", 1), {2, 1}, (2**70, 1), NAN,
    ],
    "preset": ["quick", "", 5, True, ["fast"], b"fast", NAN, object()],
    "height": SIDES,
    "width": SIDES,
    "seed": [-1, 2**63, 2**64, 1.0, "7", True, [1] * 7, [], [1.5], [None], NAN, b"7", torch.tensor(7.5)],
    "sampler": ["dpm", "", 5, ["ddim"], object(), b"ddim", True],
    "num_images_per_prompt": [0, -1, 1.0, "2", True, 10**9, None, 2**70],
    "clip_skip": [0, 2, -1, 1.0, "1", True, 2**70],
    "latents": [
        LATENTS[0], LATENTS[:, :3], LATENTS.long(), with_nan(1, 4, 4, 4), LATENTS / 0, LATENTS.numpy(), "x", 5,
        LATENTS[:0], LATENTS.repeat(2, 1, 1, 1),
    ],
    "prompt_embeds": [
        EMBEDS[0], EMBEDS[:, :5], EMBEDS[..., :3], EMBEDS.long(), with_nan(1, 77, 16), EMBEDS.numpy(), "fox", [EMBEDS],
    ],
    "image": [
        5, "fox.png", b"", np.zeros((24, 32, 3), np.uint8), Image.new("RGB", (1, 1)), Image.new("RGB", (0, 0)),
        Image.new("RGB", (33, 32)), Image.fromarray(np.full((24, 32), NAN, np.float32)), IMAGES[0], IMAGES[:, :1],
        IMAGES[:0], (IMAGES * 255).byte(), IMAGES * 255, with_nan(1, 3, 24, 32), IMAGES / 0, IMAGES[..., :30],
        torch.zeros(1).expand(1, 3, 10**6, 10**6),
    ],
    "mask_image": [
        5, "mask.png", MASK, MASK > 0, Image.new("L", (32, 24)), Image.new("L", (24, 32), 255),
        Image.new("L", (1, 1), 255), Image.new("L", (0, 0)), torch.from_numpy(MASK), with_nan(24, 32),
        torch.ones(24, 32, dtype=torch.complex64), torch.ones(24), torch.ones(3, 24, 32), torch.zeros(24, 32),
    ],
    "mask_blur": [-1, 1001, NAN, "4", True, [4]],
    "padding_mask_crop": [-1, 1.5, NAN, "4", True, 2**70],
    "strength": [0, -0.5, 1.1, NAN, INF, "0.5", True, [0.5], 0.01, b""],
    "left": [-8, 3, 10**6, 8.0, "8", True, None, NAN],
    "prompts": [("fox",), "ab", None, 5, ("fox", None), ("a", "b", "c"), [], ("a", "\ud800")],
    "seeds": [(1,), (1, 2, 3), (-1, 0), (0.5, 1), (None, 1), "12", (True, 1), 1.5],
    "count": [1, 0, -1, 2.0, "2", True, None, 10**9, 2**70],
    "t": [NAN, "5", True, [5]],
    "callback": [5, "print", [print], True],
    "guidance": [5, 7.5, "7", [7.5], True],
    "output_type": ["jpg", "", None, 5, ["pil"]],
}  # fmt: skip
SETTINGS = (
    "negative_prompt", "num_inference_steps", "guidance_scale", "guidance_rescale", "guidance_interval", "seed",
    "sampler", "clip_skip", "feature_reuse", "preset", "callback", "guidance",
)  # fmt: skip


def bad(*names: str, **own: list[Any]) -> dict[str, list[Any]]:
    return {name: BAD[name] for name in names} | own


# For each function good values of the arguments it needs, and bad ones of those it takes.
TENSORS = [IMAGES, IMAGES.half()]  # where pixels are handed back, a picture is needed
NOT_LATENTS = [LATENTS[0], LATENTS[:, :3], LATENTS.long(), with_nan(1, 4, 4, 4), LATENTS[:0], "x", None]
CALLS: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "__call__": (
        {"prompt": "fox"},
        bad("prompt", *SETTINGS, "height", "width", "num_images_per_prompt", "output_type"),
    ),
    "denoise": ({"prompt": "fox"}, bad("prompt", *SETTINGS, "latents", "prompt_embeds")),
    "image_to_image": (
        {"prompt": "fox", "image": PICTURE},
        bad("prompt", *SETTINGS, "strength", "output_type", image=[*BAD["image"], None, [], picture(520, 8)]),
    ),
    "inpaint": (
        {"prompt": "fox", "image": PICTURE, "mask_image": Image.fromarray(MASK)},
        bad(
            "prompt",
            *SETTINGS,
            "mask_image",
            "mask_blur",
            "padding_mask_crop",
            "strength",
            "output_type",
            image=[*BAD["image"], None, *TENSORS],
        ),
    ),
    "outpaint": (
        {"prompt": "fox", "image": PICTURE, "right": 8},
        bad("prompt", *SETTINGS, "left", image=[*BAD["image"], None, *TENSORS, picture(520, 520)]),
    ),
    "interpolate": (
        {"prompts": ("fox", "snow"), "seeds": (0, 1), "count": 2},
        bad("prompts", "seeds", "count", *(name for name in SETTINGS if name != "seed"), "height", "width"),
    ),
    "encode_text": ({"prompts": "fox"}, bad("clip_skip", prompts=[None, 5, ("fox", None), [], ("a", "\ud800")])),
    "encode_image": ({"image": PICTURE}, bad(image=[*BAD["image"], None])),
    "decode": ({"latents": LATENTS}, {"latents": NOT_LATENTS}),
    "decode_to_tensor": ({"latents": LATENTS}, {"latents": NOT_LATENTS}),
    "preview": ({"latents": LATENTS}, {"latents": NOT_LATENTS}),
    "unknown_words": ({"prompt": "fox"}, bad(prompt=[value for value in BAD["prompt"] if value != "fox " * 10_000])),
    "predict": (
        {"latents": LATENTS, "t": 500, "context": EMBEDS},
        bad("t", latents=NOT_LATENTS, context=[EMBEDS[0], EMBEDS[..., :3], EMBEDS.long(), with_nan(1, 77, 16), "fox"]),
    ),
}


@pytest.fixture(scope="module")
def sd(small_model: Path) -> StableDiffusion:
    return StableDiffusion.from_pretrained(small_model, device="cpu")


def call(sd: StableDiffusion, function: str, arguments: dict[str, Any]) -> Any:
    result = getattr(sd, function)(**arguments)
    return list(result) if function == "denoise" else result


def forbidden(*_: object) -> None:
    raise AssertionError("the UNet was called")


@pytest.mark.parametrize("function", CALLS)
def test_bad_values(sd, function, monkeypatch):
    resource = pytest.importorskip("resource")
    needed, bad_values = CALLS[function]
    call(sd, function, needed)
    monkeypatch.setattr(sd.unet, "forward", forbidden)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, values in bad_values.items():
        for value in values:
            with pytest.raises(REFUSED):
                call(sd, function, needed | {name: value})
                pytest.fail(f"{function}({name}={value!r:.80}) was not refused")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000, "kilobytes"


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": "fox\0snow שלום 🦊🏳️‍🌈 " + "a" * 300},
        {"prompt": np.str_("fox"), "negative_prompt": ["red"], "seed": np.int64(5), "width": np.int64(24)},
        {"num_inference_steps": 1, "guidance_scale": np.float32(3), "sampler": Sampler("euler", karras=True)},
        {"guidance_scale": -2, "guidance_interval": [0.0, 1.0], "guidance_rescale": 1, "seed": 2**63 - 3},
        {"guidance_scale": torch.tensor(2.0), "feature_reuse": [3, 6], "clip_skip": np.int64(1)},
        {"num_images_per_prompt": np.int64(2), "seed": [3, 3], "preset": np.str_("fast"), "height": 40},
    ],
)
def test_unusual_good_values(sd, arguments):
    pictures = call(sd, "__call__", {"prompt": " \t\n", "num_inference_steps": 2} | arguments)
    for drawn in pictures if isinstance(pictures, list) else [pictures]:
        assert drawn.size == (int(arguments.get("width", 32)), int(arguments.get("height", 32)))
        assert np.asarray(drawn).std() > 1


PATHS = [
    "", "none.safetensors", "none/none", "a\0b", "x" * 5000, "https://huggingface.co/a/b", "a/b/c", "/dev/zero",
    "text.txt", Path("none"), 5, True, b"tiny", [], {}, object(),
]  # fmt: skip
NUMBERS = [NAN, INF, -INF, "1", None, True, [1], 10**400, 1j, object()]
NAMES = ["", 5, True, b"style", ["style"], {}, 1.5]
DTYPES = [torch.int8, torch.complex64, "float16", 16, torch.bool, True]
FILES: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "from_pretrained": (
        {"source": "model"},
        {"source": PATHS, "device": ["toaster", "cuda:99", 5, b"cpu", "meta", [], True], "dtype": DTYPES},
    ),
    "load_lora": (
        {"path": "style.safetensors", "name": "second"},
        {"path": [*PATHS, "word.safetensors", "model", None], "name": NAMES, "weight": NUMBERS},
    ),
    "load_textual_inversion": (
        {"path": "word.safetensors"},
        {
            "path": [*PATHS, "style.safetensors", "model", None],
            "token": ["fox", " ", "\ud800", 5, True, b"x", ["<new>"], {}],
        },
    ),
    "set_adapters": (
        {},
        {"weights": [None, 5, "style", [], {"none": 1}, {5: 1}, *({"style": weight} for weight in NUMBERS)]},
    ),
    "unload_lora": ({}, {"name": ["none", 5, b"style", ["style"], {}, True]}),
    "save_pretrained": (
        {"folder": "new"},
        {"folder": ["", ".", "text.txt", "x" * 300, "a\0b", "text.txt/new", 5, None, b"new", []], "dtype": DTYPES},
    ),
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory, sd) -> Path:
    """A folder with a model, a LoRA, a word and a text."""
    folder = tmp_path_factory.mktemp("desk")
    sd.save_pretrained(folder / "model")
    write_adapters(folder)
    (folder / "text.txt").write_text("no picture")
    return folder


@pytest.mark.parametrize("function", FILES)
def test_bad_files_and_adapters(desk, function, monkeypatch):
    """Where an argument is refused, nothing is loaded and nothing is written."""
    monkeypatch.chdir(desk)
    sd = StableDiffusion.from_pretrained("model", device="cpu")
    sd.load_lora("style.safetensors")
    needed, bad_values = FILES[function]
    tokens, before, weights = sd.tokenizer, sorted(desk.rglob("*")), dict(sd.adapters.weights)
    for name, values in bad_values.items():
        for value in values:
            with pytest.raises((*REFUSED, OSError)):
                getattr(sd, function)(**needed | {name: value})
                pytest.fail(f"{function}({name}={value!r:.80}) was not refused")
            assert (sd.adapters.weights, sd.tokenizer, sorted(desk.rglob("*"))) == (weights, tokens, before), value


def test_pictures_larger_than_memory(sd, monkeypatch):
    # three maps of 8 channels, float32, at full size: 96 bytes a pixel
    monkeypatch.setattr("minisd.pipeline.memory.free_memory", lambda device: 96 * 32 * 32 * 3)
    assert len(sd("fox", num_images_per_prompt=3, num_inference_steps=1, seed=0)) == 3
    for draw in (
        lambda: sd("fox", num_images_per_prompt=4),
        lambda: sd("fox", height=64, width=64),
        lambda: sd.decode(torch.zeros(1, 4, 8, 8)),
        lambda: sd.encode_image(Image.new("RGB", (64, 64))),
        lambda: sd.interpolate(("fox", "red"), (0, 1), count=4),
        lambda: sd.outpaint("fox", Image.new("RGB", (32, 32)), right=96),
    ):
        with pytest.raises(ValueError, match="GB are free.*tile=True"):
            draw()
