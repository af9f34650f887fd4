"""Presets, the reuse of features between steps, and what `minisd bench --preset` says of them.

What a reused call returns is computed with the plain network: a hook puts the old feature in the place of the new one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from parity import SD1_TIME_FLOPS, SD1_UNET, SMALL_UNET, SMALL_UNET_2, Values, lively_model, noise, unets
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from minisd.app.cli import main
from minisd.app.metadata import parse_parameters, read_parameters
from minisd.bench import compare as bench
from minisd.bench.preset import Call, Settings, difference, flops, work
from minisd.config import SD15, TINY
from minisd.features.presets import PRESETS, find_preset
from minisd.pipeline.stable_diffusion import StableDiffusion
from minisd.samplers import Sampler
from minisd.unet import UNet

Command = Callable[..., tuple[int, list[str], str]]
FAST = PRESETS["fast"]


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return lively_model(TINY)


@pytest.fixture
def calls(sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Of each call of the UNet the rows, and whether it was plain, whole (a feature was kept) or reused one."""
    seen: list[tuple[int, str]] = []
    forward = sd.unet.forward

    def note(x: Tensor, t: Tensor, c: Tensor, *reuse: Any) -> Any:
        seen.append((len(x), "plain" if not reuse else "whole" if reuse[1] is None else "reused"))
        return forward(x, t, c, *reuse)

    monkeypatch.setattr(sd.unet, "forward", note)
    return seen


def last(sd: StableDiffusion, **choices: Any) -> Tensor:
    *_, step = sd.denoise("a fox in the snow", **{"seed": 3, "num_inference_steps": 6} | choices)
    return step.latents


def up_resnets(unet: UNet) -> list[nn.Module]:
    return [resnet for block in unet.up_blocks for resnet in block.resnets]  # type: ignore[union-attr]


@pytest.mark.parametrize("values", [SMALL_UNET, SMALL_UNET_2], ids=["SD 1", "SD 2"])
def test_a_reused_call_is_the_plain_network_with_the_old_feature_put_in(values: Values) -> None:
    unet = unets(values).ours
    resnets = up_resnets(unet)
    assert unet.layers == len(resnets)
    first, second = (noise(2, 4, 8, 12, seed=seed) for seed in (1, 2))
    context, before, after = noise(2, 77, values["cross_attention_dim"], seed=3), torch.tensor(600), torch.tensor(555)
    with torch.no_grad():
        for layers in range(1, unet.layers + 1):
            plain = unet(first, before, context)
            whole, feature = unet(first, before, context, layers)
            assert torch.equal(whole, plain)  # the same numbers in the same order

            place, seen = resnets[-layers], []
            hook = place.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))  # noqa: B023
            unet(first, before, context)
            hook.remove()
            channels = feature.shape[1]
            assert torch.equal(feature, seen[0][:, :channels])

            def put(module: nn.Module, inputs: tuple[Tensor, ...], old: Tensor = seen[0][:, :channels]) -> Any:
                return torch.cat([old, inputs[0][:, old.shape[1] :]], dim=1), *inputs[1:]

            hook = place.register_forward_pre_hook(put)
            expected = unet(second, after, context)
            hook.remove()
            reused, again = unet(second, after, context, layers, feature)
            assert torch.equal(reused, expected) and again is feature
            assert not torch.allclose(reused, unet(second, after, context))


def test_a_reused_call_runs_only_the_layers_it_needs(sd: StableDiffusion) -> None:
    """The tiny UNet has two layers a level: with one, one map of the way down is needed, and no deeper block."""
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in sd.unet.named_modules()
        if name.endswith((".conv1", "proj_in", ".conv", "conv_in", "conv_out"))
    ]
    x, t, context = torch.randn(1, 4, 16, 16), torch.tensor(300.0), torch.randn(1, 77, 128)
    try:
        with torch.no_grad():
            for layers, expected in (
                (1, []),
                (2, ["down_blocks.0.resnets.0.conv1", "down_blocks.0.attentions.0.proj_in",
                     "up_blocks.2.resnets.0.conv1", "up_blocks.2.attentions.0.proj_in"]),
            ):  # fmt: skip
                _, feature = sd.unet(x, t, context, layers)
                ran.clear()
                sd.unet(x, t, context, layers, feature)
                end = ["up_blocks.2.resnets.1.conv1", "up_blocks.2.attentions.1.proj_in", "conv_out"]
                assert ran == ["conv_in", *expected, *end]
    finally:
        for hook in hooks:
            hook.remove()


def test_which_calls_are_whole(sd: StableDiffusion, calls: list[tuple[int, str]]) -> None:
    last(sd, feature_reuse=(3, 1), guidance_scale=1.0)
    assert [kind for _, kind in calls] == ["whole", "reused", "reused"] * 2
    calls.clear()
    last(sd, feature_reuse=(2, 2))
    assert calls == [(2, "whole"), (2, "reused")] * 3
    calls.clear()
    # guidance begins at the third call, where there is no feature against the prompt yet; at its end there is one
    last(sd, feature_reuse=(4, 1), guidance_interval=(0.3, 0.6))
    assert calls == [(1, "whole"), (1, "reused"), (2, "whole"), (2, "reused"), (1, "reused"), (1, "reused")]
    calls.clear()
    last(sd)
    last(sd, feature_reuse=(1, 1))
    assert calls == [(2, "plain")] * 12


def test_after_guidance_the_feature_of_the_prompt_is_reused(sd: StableDiffusion) -> None:
    """The same walk by hand: whole calls keep both features, and the one without guidance takes the second."""
    run = Sampler("euler").plan(sd.schedule, 3)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    found = last(
        sd, latents=latents, num_inference_steps=3, sampler="euler", guidance_scale=3.0,
        guidance_interval=(0.0, 0.5), feature_reuse=(3, 2), negative_prompt="night",
    )  # fmt: skip
    context = sd.encode_text(["night", "a fox in the snow"])
    state = run.start(latents)
    with torch.inference_mode():
        for index, t in enumerate(run.timesteps):
            x, moment = run.model_input(state), torch.tensor(t)
            if index == 0:
                both, feature = sd.unet(torch.cat([x, x]), moment, context, 2)
            elif index == 1:
                both, _ = sd.unet(torch.cat([x, x]), moment, context, 2, feature)
            else:
                one, _ = sd.unet(x, moment, context[1:], 2, feature[1:])
            prediction = one if index == 2 else both[:1] + 3.0 * (both[1:] - both[:1])
            state, _ = run.step(state, prediction)
    assert torch.allclose(found, run.latents(state), atol=1e-5)


def test_without_reuse_nothing_changes(sd: StableDiffusion) -> None:
    assert torch.equal(last(sd, feature_reuse=(1, 3)), last(sd))
    assert not torch.allclose(last(sd, feature_reuse=(2, 1)), last(sd), atol=1e-3)


def test_interleaved_runs_with_reuse_keep_their_own_features(sd: StableDiffusion) -> None:
    alone = [last(sd, seed=seed, feature_reuse=(3, 1)) for seed in (1, 2)]
    runs = [
        sd.denoise("a fox in the snow", seed=seed, num_inference_steps=6, feature_reuse=(3, 1)) for seed in (1, 2)
    ]
    *_, (one, two) = zip(*runs, strict=True)
    assert torch.equal(one.latents, alone[0]) and torch.equal(two.latents, alone[1])


def test_the_preset_is_its_settings_and_what_is_asked_for_wins(
    sd: StableDiffusion, calls: list[tuple[int, str]]
) -> None:
    plain = dict(FAST.settings)
    fast = last(sd, num_inference_steps=None, preset="fast")
    assert len(calls) == FAST.settings["num_inference_steps"] and "reused" in dict(map(reversed, calls))
    assert torch.equal(fast, last(sd, **plain))
    calls.clear()
    mine = {"num_inference_steps": 4, "guidance_interval": (0.0, 0.5), "feature_reuse": (4, 1), "sampler": "ddim"}
    asked = last(sd, preset="fast", **mine)
    assert calls == [(2, "whole"), (2, "reused"), (1, "reused"), (1, "reused")]
    assert torch.equal(asked, last(sd, **mine))


@pytest.mark.parametrize(
    ("choices", "kind", "message"),
    [
        ({"preset": "quick"}, ValueError, "unknown preset 'quick'; choose one of fast"),
        ({"preset": 3}, TypeError, "preset must be a name, one of fast; got int"),
        ({"feature_reuse": (0, 1)}, ValueError, "feature_reuse=0; expected a whole number from 1"),
        ({"feature_reuse": (2, 7)}, ValueError, "expected 1 to 6 layers"),
        ({"feature_reuse": 3}, TypeError, r"feature_reuse=3; expected two numbers, \(every, layers\)"),
        ({"feature_reuse": (2, 1.0)}, TypeError, "expected a whole number"),
    ],
)
def test_bad_values_are_refused(sd: StableDiffusion, choices: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        sd.denoise("a fox", **choices)
    with pytest.raises(ValueError, match="expected 1 to 6"):
        sd.unet(torch.zeros(1, 4, 16, 16), torch.tensor(1), torch.zeros(1, 77, 128), 7)


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_picture_of_the_preset_is_drawn_again_from_what_it_says(run: Command, small_model: Path) -> None:
    code, files, said = run("generate", "a fox", "--seed", "5", "--preset", "fast", "-o", "fast.png")
    assert (code, files) == (0, ["fast.png"]) and FAST.describe() in said
    assert run("generate", "--like", "fast.png", "-o", "again.png")[0] == 0
    assert np.array_equal(pixels("again.png"), pixels("fast.png"))
    model = StableDiffusion.from_pretrained(small_model, device="cpu")
    assert np.array_equal(np.asarray(model("a fox", seed=5, preset="fast")), pixels("fast.png"))
    assert run("generate", "a fox", "--seed", "5", "-o", "plain.png")[0] == 0
    assert not np.array_equal(pixels("plain.png"), pixels("fast.png"))
    # a picture drawn without it, again with it; and one drawn with it, again without reuse and in another interval
    assert run("generate", "--like", "plain.png", "--preset", "fast", "-o", "faster.png")[0] == 0
    assert np.array_equal(pixels("faster.png"), pixels("fast.png"))
    other = ["--reuse", "1", "1", "--guidance-interval", "0.25", "0.75", "--steps", "5"]
    assert run("generate", "--like", "fast.png", *other, "-o", "other.png")[0] == 0
    settings = parse_parameters(read_parameters("other.png") or "").settings
    assert (settings["Steps"], settings["Guidance interval"]) == ("5", "0.25 0.75")
    mine = {"num_inference_steps": 5, "guidance_interval": (0.25, 0.75), "sampler": Sampler("dpmpp_2m", "trailing")}
    assert np.array_equal(np.asarray(model("a fox", seed=5, **mine)), pixels("other.png"))


def test_lines_of_a_prompts_file_have_presets_of_their_own(run: Command, small_model: Path) -> None:
    lines = [
        {"prompt": "a fox", "seed": 1, "preset": "fast"},
        {"prompt": "a fox", "seed": 1, "preset": "fast", "sampler": "ddim", "num_inference_steps": 4},
        {"prompt": "a fox", "seed": 1, "feature_reuse": [2, 1], "guidance_interval": [0.0, 0.5]},
        {"prompt": "a fox", "seed": 1},
    ]
    Path("prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, files, _ = run("generate", "--prompts", "prompts.jsonl", "-o", "out")
    assert code == 0 and len(files) == 4
    model = StableDiffusion.from_pretrained(small_model, device="cpu")
    for line, file in zip(lines, files, strict=True):
        drawn = model(**line)  # type: ignore[arg-type]
        assert np.array_equal(np.asarray(drawn), pixels(file)), line
        assert run("generate", "--like", file, "-o", "again.png", "--overwrite")[0] == 0
        assert np.array_equal(pixels("again.png"), pixels(file)), line
    code, files, said = run("generate", "--prompts", "prompts.jsonl", "-o", "out")
    assert code == 0 and files == [] and "4 were there already" in said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"preset": "quick"}, "line 1: unknown preset 'quick'; choose one of fast"),
        ({"feature_reuse": [2]}, "line 1: feature_reuse is [2]; expected a list of two numbers"),
        ({"feature_reuse": 2}, "line 1: feature_reuse is 2; expected a list"),
        ({"feature_reuse": [2, 1.5]}, "line 1: feature_reuse=1.5; expected a whole number"),
        ({"guidance_interval": [1, 0]}, "line 1: guidance_interval=(1, 0); expected two numbers"),
        ({"guidance_interval": [0, "1"]}, 'line 1: guidance_interval is [0, "1"]; expected a list of two numbers'),
    ],
)
def test_bad_lines_are_named(run: Command, line: dict[str, Any], message: str) -> None:
    Path("prompts.jsonl").write_text(json.dumps({"prompt": "a fox"} | line) + "\n")
    code, _, said = run("generate", "--prompts", "prompts.jsonl", "-o", "out")
    assert code == 2 and message in said and not Path("out").exists()


def test_an_unknown_preset_names_the_known_ones(run: Command) -> None:
    code, _, said = run("generate", "a fox", "--preset", "quick")
    assert code == 2 and "'quick'" in said and "fast" in said
    with pytest.raises(ValueError, match="choose one of fast"):
        find_preset("quick")


def test_flops_of_a_reused_call_by_hand() -> None:
    """Of full size, layers = 1: conv_in, the time embedding, one residual block, one transformer, conv_out."""
    cells, c, d, words, text, time = 64 * 64, 320, 1280, 77, 768, 1280
    convolutions = cells * (4 * c * 9 + 2 * c * c * 9 + c * c * 9 + 2 * c * c + c * 4 * 9)
    embedding = 320 * time + time * time + time * c
    outer = cells * 2 * c * c
    itself = cells * 4 * c * c + 2 * cells * cells * c
    cross = cells * 2 * c * c + 2 * words * text * c + 2 * cells * words * c
    feed_forward = cells * (c * 2 * d + d * c)
    by_hand = 2 * (convolutions + embedding + outer + itself + cross + feed_forward)
    assert flops(SD15, [Call(1, 1, True)]) == by_hand
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(dict(SD1_UNET))
        latents, context = torch.empty(2, 4, 64, 64), torch.empty(2, 77, 768)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        theirs(latents, torch.tensor(481.0, device="meta"), context)
    step = counter.get_total_flops() - SD1_TIME_FLOPS
    assert flops(SD15, [Call(2)]) == flops(SD15, [Call(2, 1)]) == step
    decode = bench.flops(SD15, 512)["decode"]
    found = work(SD15, [Call(2)] * 4, [Call(2, 1), Call(2, 1, True), Call(1, 1), Call(1, 1, True)])
    after = 1.5 * step + 3 * by_hand
    assert found["unet_ratio"] == pytest.approx(after / (4 * step), abs=1e-4)
    assert found["picture_ratio"] == pytest.approx((after + decode) / (4 * step + decode), abs=1e-4)


def test_the_preset_takes_less_than_half_of_the_work_at_full_size(
    sd: StableDiffusion, calls: list[tuple[int, str]]
) -> None:
    last(sd, num_inference_steps=None, preset="fast")
    layers = FAST.settings["feature_reuse"][1]
    fast = [Call(rows, layers, kind == "reused") for rows, kind in calls]
    assert work(SD15, [Call(2)] * 20, fast)["picture_ratio"] <= 0.45


def test_difference_by_hand() -> None:
    before, after = [True] * 3 + [False] * 7, [True] * 2 + [False] + [True] * 4 + [False] * 3
    # 4 gained, 1 lost, of 10: d = 0.3, s² = (5 − 9/10) / 100
    reach = 1.959964 * math.sqrt(4.1) / 10
    expected = {"change": 0.3, "low": round(0.3 - reach, 4), "high": round(0.3 + reach, 4)}
    assert difference(before, after) == expected
    assert difference(after, before)["change"] == -0.3
    with pytest.raises(ValueError, match="at least 1"):
        Settings(pictures=0)


def test_the_command_measures_the_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "preset.json"
    words = f"bench --preset fast --model tiny --pictures 3 --steps 4 --threads 1 --device cpu -o {path}"
    assert main(words.split()) == 0
    report = json.loads(path.read_text())
    assert report["calls"] == [4, FAST.settings["num_inference_steps"]]
    assert report["judge"]["attributes"]["everything"][1]["of"] == 3
    assert report["work"]["Stable Diffusion 1.5"]["unet_gflop"][0] == pytest.approx(4 * 1607, rel=0.01)
    assert 10 < report["psnr"]["mean"] < 60 and report["seconds"]["a_picture"][0] > 0
    assert Image.open(path.with_suffix(".png")).size == (8 * 128, 2 * 128)
    assert FAST.describe() in capsys.readouterr().err


def test_a_model_that_the_judge_does_not_know_is_only_timed(small_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "preset.json"
    words = f"bench --preset fast --model {small_model} --pictures 2 --steps 2 --threads 1 --device cpu -o {path}"
    assert main(words.split()) == 0
    report = json.loads(path.read_text())
    assert report["calls"] == [2, FAST.settings["num_inference_steps"]] and "judge" not in report
    assert report["work"]["this model"]["size"] == 32 and report["seconds"]["ratio"] > 0
    assert Image.open(path.with_suffix(".png")).size == (32, 64)
