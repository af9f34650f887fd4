"""`minisd bench --preset`: what a preset saves, and what it costs. One model draws the same pictures with and without.

Time is measured in turns, A B A B …; work is counted, call by call, for this model and for Stable Diffusion 1.5. Where
the model draws the scenes that the judge knows, the judge says how many pictures show what they should, both ways.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from minisd.bench.compare import flops as step_and_decode
from minisd.bench.worker import PROMPT
from minisd.config import SD15, ModelConfig
from minisd.evaluation.metrics import Z95
from minisd.features.deepcache import run_full, run_last
from minisd.features.presets import find_preset
from minisd.images import grid
from minisd.pipeline.stable_diffusion import StableDiffusion
from minisd.unet import UNet

SIDE = 128  # of the pictures that the judge knows


@dataclass(frozen=True)
class Settings:
    """What is drawn: `pictures` of them, `batch` at a time, without the preset in `steps` steps; seeds from 0 on."""

    preset: str = "fast"
    pictures: int = 128
    batch: int = 16
    steps: int = 20

    def __post_init__(self) -> None:
        find_preset(self.preset)
        if min(self.pictures, self.batch, self.steps) < 1:
            raise ValueError(f"{self}; expected at least 1 of each")


@dataclass(frozen=True)
class Call:
    """A call of the UNet, for how many rows: full, or (feature reuse) of its last layers alone."""

    rows: int
    full: bool


def record(sd: StableDiffusion, draw: Callable[[], Sequence[Image.Image]]) -> tuple[list[Image.Image], list[Call]]:
    """The pictures that a function draws, and the calls of the UNet while it draws them."""
    calls: list[Call] = []

    def begin(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append(Call(len(inputs[0]), full=False))

    def reach_middle(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[-1] = replace(calls[-1], full=True)

    hooks = [
        sd.unet.conv_in.register_forward_pre_hook(begin),
        sd.unet.mid_block.register_forward_pre_hook(reach_middle),
    ]
    try:
        return list(draw()), calls
    finally:
        for hook in hooks:
            hook.remove()


def flops(config: ModelConfig, calls: Sequence[Call], depth: int) -> int:
    """Floating-point operations of these calls at the model's own size, counted on shapes alone.

    depth: how many of the last layers a call that is not full runs.
    """
    side = config.unet.sample_size
    with torch.device("meta"):
        unet, t = UNet(config.unet), torch.tensor(481.0)
    total = 0
    for call, times in Counter(calls).items():
        latents = torch.empty(call.rows, config.unet.in_channels, side, side, device="meta")
        context = torch.empty(call.rows, 77, config.unet.cross_attention_dim, device="meta")
        with torch.inference_mode():
            feature = None if call.full else run_full(unet, latents, t, context, depth)[1]
            with FlopCounterMode(display=False) as counter:
                if feature is None:
                    unet(latents, t, context)
                else:
                    run_last(unet, latents, t, context, depth, feature)
        total += times * counter.get_total_flops()
    return total


def work(config: ModelConfig, plain: Sequence[Call], fast: Sequence[Call], depth: int) -> dict[str, Any]:
    """What one picture takes, without and with the preset, and the ratios: of the UNet, and with the decoder."""
    size = config.unet.sample_size * config.autoencoder.downscale
    decode = step_and_decode(config, size)["decode"]
    before, after = flops(config, plain, depth), flops(config, fast, depth)
    return {
        "size": size,
        "unet_gflop": [round(count / 1e9, 2) for count in (before, after)],
        "decode_gflop": round(decode / 1e9, 2),
        "unet_ratio": round(after / before, 4),
        "picture_ratio": round((after + decode) / (before + decode), 4),
    }


def run(
    sd: StableDiffusion, settings: Settings, say: Callable[[str], None] = print
) -> tuple[dict[str, Any], Image.Image]:
    """Draw, time and judge. Returns the report and a picture: in it the steps without the preset above, with it below.

    Where the judge knows the model's pictures, they are of fixed prompts and of the scenes of `minisd evaluate`.
    """
    judged = sd.unet.config.sample_size * sd.autoencoder.config.downscale == SIDE
    ways: tuple[dict[str, Any], ...] = ({"num_inference_steps": settings.steps}, {"preset": settings.preset})
    prompts = _prompts(settings, judged)
    calls, drawn, seconds = _in_turns(sd, ways, prompts, settings.batch if judged else 1, say)
    _, depth = find_preset(settings.preset).settings.get("feature_reuse", (1, 1))
    report: dict[str, Any] = {
        "settings": asdict(settings),
        "preset": find_preset(settings.preset).describe(),
        "calls": [len(one) for one in calls],
        "work": {
            "this model": work(sd.config, calls[0], calls[1], depth),
            "Stable Diffusion 1.5": work(SD15, calls[0], calls[1], depth),
        },
        "seconds": seconds,
        "psnr": _psnr(*drawn),
    }
    if not judged:
        return report, grid([Image.fromarray(pixels[0]) for pixels in drawn], columns=1)
    from minisd.training.unet import PROMPTS

    report["judge"] = _judge(settings, *drawn)
    shown = list(PROMPTS[:8])
    rows = [sd(shown, seed=[0] * len(shown), progress=False, **choices) for choices in ways]
    return report, grid(sum(rows, []), columns=len(shown))


def _prompts(settings: Settings, judged: bool) -> list[str]:
    if not judged:
        return [PROMPT] * settings.pictures
    from minisd.evaluation.measure import Settings as Scenes

    return [scene.caption for scene in Scenes(count=settings.pictures).scenes()]


def _in_turns(
    sd: StableDiffusion,
    ways: Sequence[dict[str, Any]],
    prompts: Sequence[str],
    size: int,
    say: Callable[[str], None],
) -> tuple[list[list[Call]], list[np.ndarray], dict[str, Any]]:
    """Draw `size` pictures one way, then the other way, and so on.

    Of each way: the calls of the UNet for one picture, the pixels (n, h, w, 3), and how long a picture took.
    """
    calls: list[list[Call]] = [[], []]
    pixels: list[list[np.ndarray]] = [[], []]
    times: list[list[float]] = [[], []]
    sd(prompts[0], seed=0, num_inference_steps=1, progress=False)  # warms up
    for first in range(0, len(prompts), size):
        some = prompts[first : first + size]
        say(f"pictures {first + 1} to {first + len(some)} of {len(prompts)}, without and with the preset")
        for way, choices in enumerate(ways):
            seeds = list(range(first, first + len(some)))
            draw = partial(sd, some, seed=seeds, progress=False, **choices)
            started = time.perf_counter()
            drawn, made = record(sd, draw)
            times[way].append((time.perf_counter() - started) / len(some))
            calls[way] = [replace(call, rows=call.rows // len(some)) for call in made]
            pixels[way] += [np.asarray(picture) for picture in drawn]
    ratios = [fast / plain for plain, fast in zip(*times, strict=True)]
    seconds = {
        "a_picture": [round(statistics.median(one), 3) for one in times],
        "ratio": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
    }
    return calls, [np.stack(one) for one in pixels], seconds


def _psnr(plain: np.ndarray, fast: np.ndarray) -> dict[str, float]:
    """How near each picture comes to the one without the preset, in decibels: the mean, and the tenth from below."""
    error = np.square((plain.astype(float) - fast) / 255).mean((1, 2, 3))
    decibels = -10 * np.log10(np.maximum(error, 1e-10))
    return {"mean": round(float(decibels.mean()), 2), "lowest_tenth": round(float(np.quantile(decibels, 0.1)), 2)}


def _judge(settings: Settings, plain: np.ndarray, fast: np.ndarray) -> dict[str, Any]:
    """For every attribute the share of right cases, both ways; and how the pictures differ, each beside its own."""
    from minisd.evaluation.attributes import marks, tally
    from minisd.evaluation.measure import Settings as Scenes
    from minisd.evaluation.measure import verdicts_of
    from minisd.training.judge import Judge

    scenes, judge = Scenes(count=settings.pictures).scenes(), Judge.load()
    verdicts = [verdicts_of(judge, pixels, settings.batch) for pixels in (plain, fast)]
    tallies = [tally(scenes, seen) for seen in verdicts]
    given = [[marks(*pair) for pair in zip(scenes, seen, strict=True)] for seen in verdicts]
    differences = {
        name: difference(*([all(one[name]) for one in way] for way in given)) for name in ("object", "everything")
    }
    shares = {name: [one[name].to_dict() for one in tallies] for name in tallies[0] if tallies[0][name].of}
    return {"attributes": shares, "difference": differences}


def difference(before: Sequence[bool], after: Sequence[bool]) -> dict[str, float]:
    """The share that is right after, less that before, with its 95% interval, of cases that belong together in pairs.

    Source: the variance of a difference of paired proportions, Newcombe 1998 (Statistics in Medicine 17), method 1.
    """
    n = len(before)
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    # d = (g − l) / n,   s² = (g + l − (g − l)²/n) / n²
    change, reach = (gained - lost) / n, Z95 * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    return {"change": round(change, 4), "low": round(change - reach, 4), "high": round(change + reach, 4)}


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    steps = report["settings"]["steps"]
    lines = [report["preset"], f"{'':<44}{f'{steps} steps':>12}{'preset':>12}{'ratio':>8}"]

    def add(what: str, pair: Sequence[object], ratio: float | None = None) -> None:
        lines.append(f"{what:<44}{pair[0]:>12}{pair[1]:>12}" + ("" if ratio is None else f"{ratio:>8.3f}"))

    add("calls of the UNet", report["calls"])
    for name, one in report["work"].items():
        add(f"{name}, {one['size']}²: UNet, GFLOP", one["unet_gflop"], one["unet_ratio"])
        both = [round(count + one["decode_gflop"], 2) for count in one["unet_gflop"]]
        add(f"{name}, {one['size']}²: with decoder, GFLOP", both, one["picture_ratio"])
    seconds = report["seconds"]
    add("seconds for a picture", seconds["a_picture"], seconds["ratio"])
    lines.append(f"ratio of the times, from {seconds['lowest']} to {seconds['highest']}")
    for name, shares in report.get("judge", {}).get("attributes", {}).items():
        of = " and ".join(str(one["of"]) for one in shares)
        add(f"judge: {name} (of {of})", [f"{one['share']:.3f}" for one in shares])
    for name, one in report.get("judge", {}).get("difference", {}).items():
        reach = f"95% interval {one['low']:+.3f} to {one['high']:+.3f}"
        lines.append(f"share of pictures right in {name}: {one['change']:+.3f}, {reach}")
    lines.append(f"PSNR beside {steps} steps: {report['psnr']['mean']} dB")
    return "\n".join(lines)
