"""`minisd bench --preset`: what a preset saves, and what it costs. One model draws the same pictures with and without.

Times are taken in turn, A B A B …; FLOPs are counted call by call, for this model and for Stable Diffusion 1.5. If the
model draws scenes that the attribute classifier knows, it counts how many pictures show what they should, both ways.
"""

from __future__ import annotations

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
from minisd.config import SD15, TINY, ModelConfig
from minisd.evaluation.metrics import paired_difference
from minisd.features.deepcache import run_full, run_last
from minisd.features.presets import find_preset
from minisd.images import grid
from minisd.pipeline.stable_diffusion import StableDiffusion
from minisd.unet import UNet

SIDE = TINY.autoencoder.sample_size  # of the scenes that the attribute classifier knows, in pixels


@dataclass(frozen=True)
class Settings:
    """What is drawn.

    Args:
        preset: its name.
        pictures: how many, with seeds from 0 on.
        batch: how many at a time.
        steps: sampling steps without the preset.
    """

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
    """A call of the UNet with a batch of `rows`: full, or (with feature reuse) of its last layers only."""

    rows: int
    full: bool


def record(sd: StableDiffusion, draw: Callable[[], Sequence[Image.Image]]) -> tuple[list[Image.Image], list[Call]]:
    """Draw pictures, and record the calls of the UNet meanwhile."""
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
    """Count the floating-point operations of calls at the model's own size, on the meta device.

    Args:
        config: of the model.
        calls: the calls of the UNet.
        depth: how many of its last layers a call runs that is not full.
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
    """The GFLOP of one picture, without and with the preset; the ratios for the UNet alone, and with the decoder."""
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
    sd: StableDiffusion, settings: Settings, log: Callable[[str], None] = print
) -> tuple[dict[str, Any], Image.Image]:
    """Draw, time and judge. Returns the report and a sheet of pictures: without the preset above, with it below.

    For models that the attribute classifier knows, the prompts are the scenes of `minisd evaluate`, and the sheet shows
    fixed prompts.
    """
    judged = sd.unet.config.sample_size * sd.autoencoder.config.downscale == SIDE
    ways: tuple[dict[str, Any], ...] = ({"num_inference_steps": settings.steps}, {"preset": settings.preset})
    prompts = _prompts(settings, judged)
    calls, drawn, seconds = _draw_in_turn(sd, ways, prompts, settings.batch if judged else 1, log)
    _, depth = find_preset(settings.preset).settings.get("feature_reuse", (1, 1))
    report: dict[str, Any] = {
        "settings": asdict(settings),
        "preset": find_preset(settings.preset).describe(),
        "calls": [len(some) for some in calls],
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


def _draw_in_turn(
    sd: StableDiffusion,
    ways: Sequence[dict[str, Any]],
    prompts: Sequence[str],
    size: int,
    log: Callable[[str], None],
) -> tuple[list[list[Call]], list[np.ndarray], dict[str, Any]]:
    """Draw the pictures in batches of `size`, with the ways taking turns.

    Returns:
        For each way, the UNet's calls for one picture and the pixels (n, h, w, 3); the times per picture.
    """
    calls: list[list[Call]] = [[], []]
    pixels: list[list[np.ndarray]] = [[], []]
    times: list[list[float]] = [[], []]
    sd(prompts[0], seed=0, num_inference_steps=1, progress=False)  # warm-up
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        log(f"pictures {first + 1} to {first + len(batch)} of {len(prompts)}, without and with the preset")
        for way, choices in enumerate(ways):
            seeds = list(range(first, first + len(batch)))
            draw: Callable[[], Any] = partial(sd, batch, seed=seeds, progress=False, **choices)
            started = time.perf_counter()
            pictures, batch_calls = record(sd, draw)
            times[way].append((time.perf_counter() - started) / len(batch))
            calls[way] = [replace(call, rows=call.rows // len(batch)) for call in batch_calls]
            pixels[way] += [np.asarray(picture) for picture in pictures]
    ratios = [fast / plain for plain, fast in zip(*times, strict=True)]
    seconds = {
        "a_picture": [round(statistics.median(one), 3) for one in times],
        "ratio": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
    }
    return calls, [np.stack(one) for one in pixels], seconds


def _psnr(plain: np.ndarray, fast: np.ndarray) -> dict[str, float]:
    """The PSNR of pictures with the preset against those without, in dB: the mean, and the 10% quantile."""
    error = np.square((plain.astype(float) - fast) / 255).mean((1, 2, 3))
    decibels = -10 * np.log10(np.maximum(error, 1e-10))
    return {"mean": round(float(decibels.mean()), 2), "lowest_tenth": round(float(np.quantile(decibels, 0.1)), 2)}


def _judge(settings: Settings, plain: np.ndarray, fast: np.ndarray) -> dict[str, Any]:
    """For every attribute, the share of correct cases, both ways; and the paired differences of the shares."""
    from minisd.evaluation.attributes import marks, tally
    from minisd.evaluation.measure import Settings as Scenes
    from minisd.evaluation.measure import verdicts_of
    from minisd.training.judge import Judge

    scenes, judge = Scenes(count=settings.pictures).scenes(), Judge.load()
    verdicts = [verdicts_of(judge, pixels, settings.batch) for pixels in (plain, fast)]
    tallies = [tally(scenes, some) for some in verdicts]
    results = [[marks(*pair) for pair in zip(scenes, some, strict=True)] for some in verdicts]
    differences = {}
    for name in ("object", "everything"):
        found = paired_difference(*([all(result[name]) for result in way] for way in results))
        differences[name] = dict(zip(("change", "low", "high"), (round(value, 4) for value in found), strict=True))
    shares = {name: [shares[name].to_dict() for shares in tallies] for name in tallies[0] if tallies[0][name].of}
    return {"attributes": shares, "difference": differences}


def table(report: dict[str, Any]) -> str:
    """Format the report as text."""
    steps = report["settings"]["steps"]
    lines = [report["preset"], f"{'':<44}{f'{steps} steps':>12}{'preset':>12}{'ratio':>8}"]

    def add(what: str, pair: Sequence[object], ratio: float | None = None) -> None:
        lines.append(f"{what:<44}{pair[0]:>12}{pair[1]:>12}" + ("" if ratio is None else f"{ratio:>8.3f}"))

    add("calls of the UNet", report["calls"])
    for name, row in report["work"].items():
        add(f"{name}, {row['size']}²: UNet, GFLOP", row["unet_gflop"], row["unet_ratio"])
        both = [round(count + row["decode_gflop"], 2) for count in row["unet_gflop"]]
        add(f"{name}, {row['size']}²: with decoder, GFLOP", both, row["picture_ratio"])
    seconds = report["seconds"]
    add("seconds for a picture", seconds["a_picture"], seconds["ratio"])
    lines.append(f"ratio of the times, from {seconds['lowest']} to {seconds['highest']}")
    for name, shares in report.get("judge", {}).get("attributes", {}).items():
        of = " and ".join(str(share["of"]) for share in shares)
        add(f"judge: {name} (of {of})", [f"{share['share']:.3f}" for share in shares])
    for name, row in report.get("judge", {}).get("difference", {}).items():
        interval = f"95% interval {row['low']:+.3f} to {row['high']:+.3f}"
        lines.append(f"share of pictures right in {name}: {row['change']:+.3f}, {interval}")
    lines.append(f"PSNR against {steps} steps: {report['psnr']['mean']} dB")
    return "\n".join(lines)
