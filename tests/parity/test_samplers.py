"""The samplers, against diffusers' schedulers (call by call)."""

from __future__ import annotations

import copy
import importlib
import math
import sys
from dataclasses import replace
from functools import cache
from itertools import product
from types import ModuleType, SimpleNamespace
from typing import Any

import mpmath
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from stand_ins import MU, SHAPE, SPACINGS, gaussian, schedule_for, unet
from torch import Tensor

from minisd import Sampler
from minisd.features.more_samplers import WHOLE_TIMESTEPS
from minisd.pipeline.stable_diffusion import StableDiffusion
from minisd.samplers import Plan

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers', often

STEPS = (1, 2, 3, 9, 20, 27, 50)
TOLERANCE = 1e-4

SD = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
# diffusers' module imports torchsde, which is used for its noise only; here it is given other noise, `Brownian`
sys.modules.setdefault("torchsde", ModuleType("torchsde"))
DPMSolverSDEScheduler: Any = importlib.import_module(
    "diffusers.schedulers.scheduling_dpmsolver_sde"
).DPMSolverSDEScheduler

VARIANTS = {
    "ddpm": (Sampler("ddpm"), DDPMScheduler, {"clip_sample": False}),
    "ddim": (Sampler("ddim"), DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "ddim, eta=1": (Sampler("ddim", eta=1), DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "pndm": (Sampler("pndm"), PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "euler": (Sampler("euler"), EulerDiscreteScheduler, {}),
    "euler, karras": (Sampler("euler", karras=True), EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "euler_a": (Sampler("euler_a"), EulerAncestralDiscreteScheduler, {}),
    "heun": (Sampler("heun"), HeunDiscreteScheduler, {}),
    "heun, karras": (Sampler("heun", karras=True), HeunDiscreteScheduler, {"use_karras_sigmas": True}),
    "dpmpp_2m": (Sampler("dpmpp_2m"), DPMSolverMultistepScheduler, {}),
    "dpmpp_2m, karras": (Sampler("dpmpp_2m", karras=True), DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "lcm": (Sampler("lcm"), LCMScheduler, {}),
    "dpmpp_2m_sde": (Sampler("dpmpp_2m_sde"), DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_sde": (Sampler("dpmpp_sde"), DPMSolverSDEScheduler, {}),
    "unipc": (Sampler("unipc"), UniPCMultistepScheduler, {}),
    "deis": (Sampler("deis"), DEISMultistepScheduler, {}),
}
for _name in ("dpmpp_2m_sde", "dpmpp_sde", "unipc", "deis"):
    _, _kind, _extra = VARIANTS[_name]
    VARIANTS[f"{_name}, karras"] = (Sampler(_name, karras=True), _kind, _extra | {"use_karras_sigmas": True})
for _name in ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "unipc", "deis"):
    for _levels in ("exponential", "beta"):
        _, _kind, _extra = VARIANTS[_name]
        _extra = _extra | {f"use_{_levels}_sigmas": True}
        VARIANTS[f"{_name}, {_levels}"] = (Sampler(_name, sigmas=_levels), _kind, _extra)

# Where diffusers 0.42 does something else by design, and what its scheduler is told here so that it agrees.
#
# 1. DDIM and PNDM step from t to t − 1000//n, whatever the next timestep is. Where timesteps are not evenly
#    1000//n apart, the latents then lie at another level than the next call takes them for. minisd steps to
#    the next timestep; diffusers is told the true gap.
UNEVEN = {
    (name, spacing, n)
    for name in ("ddim", "ddim, eta=1", "pndm")
    for spacing, counts in {"linspace": (2, 3, 9, 20, 27, 50), "trailing": (3, 9, 27)}.items()
    for n in counts
}
# 2. PNDM extrapolates whatever the UNet predicts. The paper extrapolates the noise; for v, whose relation to
#    the noise changes along the way, that costs the method its order (measured below). minisd extrapolates
#    the noise; diffusers is given the noise that v implies.
# 3. PNDM in image-to-image: diffusers cuts the list of calls, in which the second timestep stands twice, so
#    one step is out of place. minisd cuts steps, then repeats the second one left; diffusers is given that.
# 4. DPM-Solver's timesteps are whole numbers. At these numbers of steps, one Karras level is so near the middle of two
#    of them, or one exponential level so near to one, that diffusers rounds it in float32 to the next; minisd does not.
TIES = {"karras": (18, 35, 43), "exponential": (17, 33, 49)}
# 5. Trailing spacing with n = 61, 103, 121 …: diffusers makes n + 1 steps, the last at t = −1. minisd makes n.


class Brownian:
    """Unit increments of a Brownian motion in σ, made from the noise that minisd's calls are given one by one.

    diffusers asks for the increment to the midpoint of a step, then for that of the whole step.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator, self.begun = generator, None

    def __call__(self, begin: Tensor, end: Tensor) -> Tensor:
        z = torch.randn(SHAPE, generator=self.generator)
        if self.begun is None:
            self.begun = (z * (begin - end) ** 0.5, end)
            return z
        (increment, middle), self.begun = self.begun, None
        return (increment + z * (middle - end) ** 0.5) / (begin - end) ** 0.5


@cache
def beta_quantile(p: float, a: float, b: float) -> float:
    """scipy.stats.beta.ppf, which diffusers calls and the tests do not install."""
    if p in (0.0, 1.0):
        return p
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        below = mpmath.fp.betainc(a, b, 0, middle, regularized=True) < p
        low, high = (middle, high) if below else (low, middle)
    return low


@pytest.fixture(autouse=True)
def scipy(monkeypatch):
    stand_in = SimpleNamespace(stats=SimpleNamespace(beta=SimpleNamespace(ppf=beta_quantile)))
    for _, kind, _ in VARIANTS.values():
        monkeypatch.setattr(f"{kind.__module__}.is_scipy_available", lambda: True, raising=False)
        monkeypatch.setattr(f"{kind.__module__}.scipy", stand_in, raising=False)


class Gap(int):
    """A number of inference steps that makes diffusers' `1000 // steps` the gap it should be."""

    def __rfloordiv__(self, _: int) -> int:
        return int(self)


def run_ours(plan: Plan, latents: Tensor | None = None) -> list[Tensor]:
    """What the UNet sees at each call, and the final latents."""
    generator = torch.Generator().manual_seed(5)
    state, seen = plan.start(gaussian(0), latents), []
    for t in plan.timesteps:
        seen.append(plan.latents(state))
        noise = torch.randn(SHAPE, generator=generator)
        state, _ = plan.step(state, unet(seen[-1], t), noise)
    return [*seen, plan.latents(state)]


def run_theirs(
    scheduler: Any, calls: list[Any], x: Tensor, gaps: list[int] | None = None, eta: float = 0, v_to_noise: bool = False
) -> list[Tensor]:
    """The same of a diffusers scheduler; gaps: see deviation 1; v_to_noise: see deviation 2."""
    generator, seen = torch.Generator().manual_seed(5), []
    extra = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    if isinstance(scheduler, DPMSolverSDEScheduler):
        scheduler.noise_sampler = Brownian(generator)
    for i, t in enumerate(calls):
        seen.append(scheduler.scale_model_input(x, t))
        prediction = unet(seen[-1], float(t))
        if v_to_noise:
            share = scheduler.alphas_cumprod[int(t)]
            prediction = share.sqrt() * prediction + (1 - share).sqrt() * seen[-1]
        if gaps is not None:
            scheduler.num_inference_steps = Gap(gaps[i])
        x = scheduler.step(prediction, t, x, **extra, **({"eta": eta} if eta else {})).prev_sample
    return [*seen, x]


@cache
def constructed(kind: Any, *options: tuple[str, Any]) -> Any:
    """A scheduler before `set_timesteps`; many a constructor calls that with 1000 steps, which takes long."""
    return kind(**dict(options))


def theirs_for(variant: str, spacing: str | None, prediction_type: str, n: int, **more: Any) -> Any:
    _, kind, extra = VARIANTS[variant]
    named = {} if spacing is None else {"timestep_spacing": spacing}
    options = SD | extra | named | more | {"prediction_type": prediction_type}
    scheduler = copy.deepcopy(constructed(kind, *options.items()))
    scheduler.set_timesteps(n)
    return scheduler


def true_gaps(timesteps: tuple[float, ...], pndm: bool) -> list[int]:
    """How far each call should step; after the last timestep, to below 0."""
    steps = [*dict.fromkeys(int(t) for t in timesteps), -1]
    gaps = [a - b for a, b in zip(steps[:-1], steps[1:], strict=True)]
    return [gaps[0], *gaps] if pndm and len(gaps) > 1 else gaps


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference at any call, relative to the largest value there."""
    pairs = zip(ours, theirs, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize(
    ("variant", "spacing", "prediction_type"),
    [
        (variant, spacing, prediction_type)
        for variant, spacing, prediction_type in product(VARIANTS, SPACINGS, ("epsilon", "v_prediction"))
        if not variant.endswith(("exponential", "beta")) or (spacing, prediction_type) == ("leading", "epsilon")
    ],
)
def test_every_call(variant, spacing, prediction_type):
    sampler, worst = VARIANTS[variant][0], 0.0
    pndm = sampler.name == "pndm"
    v_to_noise = pndm and prediction_type == "v_prediction"
    for n in STEPS:
        plan = sampler.plan(schedule_for(prediction_type, spacing), n)
        ours = run_ours(plan)
        scheduler = theirs_for(variant, spacing, "epsilon" if v_to_noise else prediction_type, n)
        calls = list(scheduler.timesteps)
        if variant.endswith("beta"):  # at 50 steps the first two timesteps are equal, and diffusers loses its place
            scheduler.set_begin_index(0)
        assert plan.timesteps == pytest.approx([float(t) for t in calls], rel=1e-4, abs=1e-4)
        gaps = true_gaps(plan.timesteps, pndm) if (variant, spacing, n) in UNEVEN else None
        noise = gaussian(0) * scheduler.init_noise_sigma
        worst = max(worst, difference(ours, run_theirs(scheduler, calls, noise, gaps, sampler.eta or 0, v_to_noise)))
    print(f"{variant}, {spacing}, {prediction_type}: worst {worst:.1e} of the latents' scale")
    assert worst <= TOLERANCE


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if not variant.endswith("beta")])
def test_every_number_of_steps_with_the_spacing_of_the_class(variant):
    """A file that names no spacing, as published for Stable Diffusion 1 and 2: each class of diffusers has its own."""
    sampler, worst = VARIANTS[variant][0], 0.0
    for n in range(1, 51):
        plan = sampler.plan(schedule_for(spacing=None), n)
        scheduler = theirs_for(variant, None, "epsilon", n)
        calls = list(scheduler.timesteps)
        tie = sampler.name in WHOLE_TIMESTEPS and n in TIES.get(variant.partition(", ")[2], ())
        assert plan.timesteps == pytest.approx([float(t) for t in calls], rel=1e-4, abs=1 if tie else 1e-4)
        calls = list(plan.timesteps) if tie else calls
        theirs = run_theirs(scheduler, calls, gaussian(0) * scheduler.init_noise_sigma, eta=sampler.eta or 0)
        worst = max(worst, difference(run_ours(plan), theirs))
    print(f"{variant}: worst {worst:.1e} of the latents' scale")
    assert worst <= TOLERANCE


@pytest.mark.parametrize("variant", ["ddpm", "ddim", "euler", "euler_a", "dpmpp_2m", "lcm", "dpmpp_2m_sde", "unipc"])
def test_zero_terminal_snr(variant):
    """The classes of diffusers that can rescale betas. In some of them ᾱ ends at 0: they are told minisd's 2⁻²⁴."""
    sampler, worst = VARIANTS[variant][0], 0.0
    schedule = schedule_for("v_prediction", "trailing", rescale_betas_zero_snr=True)
    for n in STEPS:
        plan = sampler.plan(schedule, n)
        scheduler = theirs_for(variant, "trailing", "v_prediction", n, rescale_betas_zero_snr=True)
        assert scheduler.alphas_cumprod[-1] <= 2**-24 and scheduler.alphas_cumprod[-2] > 1e-7
        scheduler.alphas_cumprod[-1] = 2**-24
        assert schedule.alphas_cumprod == pytest.approx(scheduler.alphas_cumprod.numpy(), rel=1e-4, abs=1e-9)
        calls, noise = list(scheduler.timesteps), gaussian(0) * scheduler.init_noise_sigma
        gaps = true_gaps(plan.timesteps, False) if (variant, "trailing", n) in UNEVEN else None
        worst = max(worst, difference(run_ours(plan), run_theirs(scheduler, calls, noise, gaps)))
    print(f"{variant}: worst {worst:.1e} of the latents' scale")
    # diffusers' Euler subtracts float32 numbers of the size of the first σ, 4096
    assert worst <= (4096 * 2**-23 if variant in ("euler", "euler_a") else TOLERANCE)


@pytest.mark.parametrize(("variant", "spacing", "n"), sorted(UNEVEN))
def test_listed_deviations_are_there(variant, spacing, n):
    """Deviation 1 is real: left alone, diffusers gives something else. So the list cannot grow stale."""
    sampler = VARIANTS[variant][0]
    scheduler = theirs_for(variant, spacing, "epsilon", n)
    theirs = run_theirs(scheduler, list(scheduler.timesteps), gaussian(0), eta=sampler.eta or 0)
    assert difference(run_ours(sampler.plan(schedule_for(spacing=spacing), n)), theirs) > 3 * TOLERANCE


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if not variant.endswith(("exponential", "beta"))])
def test_image_to_image(variant, spacing):
    sampler, latents, n, skipped = VARIANTS[variant][0], gaussian(1), 20, 13
    plan = sampler.plan(schedule_for(spacing=spacing), n, start=skipped)
    scheduler = theirs_for(variant, spacing, "epsilon", n)
    if sampler.name == "pndm":
        rest = sorted(set(scheduler.timesteps.tolist()), reverse=True)[skipped:]
        calls = [rest[0], rest[1], *rest[1:]]
    else:
        order = scheduler.order
        calls = list(scheduler.timesteps[skipped * order :])
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped * order)
    x = scheduler.add_noise(latents, gaussian(0), torch.as_tensor(calls[:1]))
    gaps = true_gaps(plan.timesteps, sampler.name == "pndm") if (variant, spacing, n) in UNEVEN else None
    assert plan.timesteps == pytest.approx([float(t) for t in calls], rel=1e-4)
    theirs = run_theirs(scheduler, calls, x, gaps, sampler.eta or 0)
    assert difference(run_ours(plan, latents), theirs) <= TOLERANCE


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_lcm_at_every_number_of_steps(prediction_type):
    worst = 0.0
    for n in range(1, 51):
        plan = Sampler("lcm").plan(schedule_for(prediction_type), n)
        scheduler = theirs_for("lcm", "leading", prediction_type, n)
        calls = list(scheduler.timesteps)
        assert plan.timesteps == tuple(float(t) for t in calls)
        assert [plan.needs_noise(i) for i in range(n)] == [True] * (n - 1) + [False]
        worst = max(worst, difference(run_ours(plan), run_theirs(scheduler, calls, gaussian(0))))
    print(f"lcm, {prediction_type}: worst {worst:.1e} of the latents' scale")
    assert worst <= TOLERANCE


def test_lcm_folder_in_diffusers(small_model, tmp_path):
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    sd.defaults = replace(sd.defaults, sampler=Sampler("lcm"), num_inference_steps=4)
    sd.save_pretrained(tmp_path / "model")
    scheduler = LCMScheduler.from_pretrained(tmp_path / "model/scheduler")
    scheduler.set_timesteps(4)
    assert scheduler.config.prediction_type == sd.config.schedule.prediction_type
    *_, step = sd.denoise("a fox", seed=0)
    assert step.t == scheduler.timesteps[-1] and step.num_calls == 4


def test_order_of_pndm_fed_v():
    """Deviation 2, measured at t = 199 on the Gaussian: fed v, diffusers' PNDM is of first order only."""
    c, v = 0.5, schedule_for("v_prediction", "trailing")

    def velocity(x: Tensor, sigma: float) -> Tensor:
        signal = (sigma**2 + 1) ** -0.5
        epsilon = sigma * (x / signal - MU) / (c**2 + sigma**2)
        return signal * epsilon - sigma * signal * (x / signal - sigma * epsilon)

    def errors(n: int) -> tuple[float, float]:
        plan, scheduler = Sampler("pndm").plan(v, n), theirs_for("pndm", "trailing", "v_prediction", n)
        scheduler.alphas_cumprod = torch.as_tensor(v.alphas_cumprod.copy())
        x = torch.ones(1, dtype=torch.float64)
        state = plan.start(x)
        while plan.timesteps[state.index] > 199:
            sigma = plan.sigmas[state.index]
            x = scheduler.step(velocity(x, sigma), scheduler.timesteps[state.index], x).prev_sample
            state, _ = plan.step(state, velocity(plan.latents(state), sigma))
        first, last = plan.sigmas[0], plan.sigmas[state.index]
        exact = MU + (math.hypot(1, first) - MU) / math.hypot(c, first) * math.hypot(c, last)
        return abs(state.sample.item() - exact), abs(x.item() * math.hypot(1, last) - exact)

    coarse, fine = errors(100), errors(200)
    ours, theirs = (math.log2(a / b) for a, b in zip(coarse, fine, strict=True))
    print(f"PNDM fed v: measured order {ours:.2f} (minisd), {theirs:.2f} (diffusers); errors {fine}")
    assert theirs == pytest.approx(1, abs=0.15)
    assert ours > 1.85
    assert fine[0] < fine[1] / 20
