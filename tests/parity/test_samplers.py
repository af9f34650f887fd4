"""The samplers, against diffusers' schedulers (call by call) and against closed forms."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from torch import Tensor

from minisd.config import ScheduleConfig
from minisd.pipeline.stable_diffusion import StableDiffusion
from minisd.samplers import SAMPLERS, Run, Sampler, State
from minisd.schedule import Schedule

SHAPE = (2, 4, 3, 5)
STEPS = (1, 2, 3, 9, 20, 27, 50)
SPACINGS = ("leading", "trailing", "linspace")
TOLERANCE = 1e-4

SD = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
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
    "dpmpp_2m, karras": (
        Sampler("dpmpp_2m", karras=True),
        DPMSolverMultistepScheduler,
        {"use_karras_sigmas": True},
    ),
    "lcm": (Sampler("lcm"), LCMScheduler, {}),
}

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
# 4. Trailing spacing with n = 61, 103, 121 …: diffusers makes n + 1 steps, the last at t = −1. minisd makes n.


class Gap(int):
    """A number of inference steps that makes diffusers' `1000 // steps` the gap it should be."""

    def __rfloordiv__(self, _: int) -> int:
        return int(self)


def unet(x: Tensor, t: float) -> Tensor:
    """Stands in for the UNet: a smooth, nonlinear function of latents and timestep."""
    return torch.tanh(1.3 * x.roll(1, -1) + math.sin(t / 150)) + 0.3 * torch.cos(2 * x) - 0.2


def gaussian(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def schedule_for(prediction_type: str = "epsilon", spacing: str = "leading") -> Schedule:
    return Schedule(ScheduleConfig(prediction_type=prediction_type, timestep_spacing=spacing))


def run_ours(run: Run, latents: Tensor | None = None) -> list[Tensor]:
    """What the UNet sees at each call, and the final latents."""
    generator = torch.Generator().manual_seed(5)
    state, seen = run.start(gaussian(0), latents), []
    for t in run.timesteps:
        seen.append(run.model_input(state))
        noise = torch.randn(SHAPE, generator=generator)
        state, _ = run.step(state, unet(seen[-1], t), noise)
    return [*seen, run.latents(state)]


def run_theirs(
    scheduler: Any,
    calls: list[Any],
    x: Tensor,
    gaps: list[int] | None = None,
    eta: float = 0,
    v_to_noise: bool = False,
) -> list[Tensor]:
    """The same of a diffusers scheduler; gaps: see deviation 1; v_to_noise: see deviation 2."""
    generator, seen = torch.Generator().manual_seed(5), []
    extra = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
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


def theirs_for(variant: str, spacing: str, prediction_type: str, n: int) -> Any:
    _, kind, extra = VARIANTS[variant]
    scheduler: Any = kind(**SD | extra, timestep_spacing=spacing, prediction_type=prediction_type)
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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_call_is_that_of_diffusers(variant: str, spacing: str, prediction_type: str) -> None:
    sampler, worst = VARIANTS[variant][0], 0.0
    pndm = sampler.name == "pndm"
    v_to_noise = pndm and prediction_type == "v_prediction"
    for n in STEPS:
        run = sampler.plan(schedule_for(prediction_type, spacing), n)
        ours = run_ours(run)
        scheduler = theirs_for(variant, spacing, "epsilon" if v_to_noise else prediction_type, n)
        calls = list(scheduler.timesteps)
        assert run.timesteps == pytest.approx([float(t) for t in calls], rel=1e-4, abs=1e-4)
        gaps = true_gaps(run.timesteps, pndm) if (variant, spacing, n) in UNEVEN else None
        noise = gaussian(0) * scheduler.init_noise_sigma
        worst = max(worst, difference(ours, run_theirs(scheduler, calls, noise, gaps, sampler.eta, v_to_noise)))
    print(f"{variant}, {spacing}, {prediction_type}: worst {worst:.1e} of the latents' scale")
    assert worst <= TOLERANCE


@pytest.mark.parametrize(("variant", "spacing", "n"), sorted(UNEVEN))
def test_listed_deviations_are_there(variant: str, spacing: str, n: int) -> None:
    """Deviation 1 is real: left alone, diffusers gives something else. So the list cannot grow stale."""
    sampler = VARIANTS[variant][0]
    scheduler = theirs_for(variant, spacing, "epsilon", n)
    theirs = run_theirs(scheduler, list(scheduler.timesteps), gaussian(0), eta=sampler.eta)
    assert difference(run_ours(sampler.plan(schedule_for(spacing=spacing), n)), theirs) > 3 * TOLERANCE


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_image_to_image_is_that_of_diffusers(variant: str, spacing: str) -> None:
    sampler, latents, n, skipped = VARIANTS[variant][0], gaussian(1), 20, 13
    run = sampler.plan(schedule_for(spacing=spacing), n, start=skipped)
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
    gaps = true_gaps(run.timesteps, sampler.name == "pndm") if (variant, spacing, n) in UNEVEN else None
    assert run.timesteps == pytest.approx([float(t) for t in calls], rel=1e-4)
    theirs = run_theirs(scheduler, calls, x, gaps, sampler.eta)
    assert difference(run_ours(run, latents), theirs) <= TOLERANCE


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_lcm_is_that_of_diffusers_at_every_number_of_steps(prediction_type: str) -> None:
    worst = 0.0
    for n in range(1, 51):
        run = Sampler("lcm").plan(schedule_for(prediction_type), n)
        scheduler = theirs_for("lcm", "leading", prediction_type, n)
        calls = list(scheduler.timesteps)
        assert run.timesteps == tuple(float(t) for t in calls)
        assert [run.needs_noise(i) for i in range(n)] == [True] * (n - 1) + [False]
        worst = max(worst, difference(run_ours(run), run_theirs(scheduler, calls, gaussian(0))))
    print(f"lcm, {prediction_type}: worst {worst:.1e} of the latents' scale")
    assert worst <= TOLERANCE


def test_lcm_keeps_a_clean_picture_at_time_zero() -> None:
    """The boundary conditions by hand: c_skip = 1 and c_out = 0 at t = 0; ½ and √½ at t = 1/20, where τ = σ_data."""
    run = replace(Sampler("lcm").plan(Schedule(), 2), timesteps=(0.0, 0.05))
    x0, noise = gaussian(1, torch.float64), torch.zeros(SHAPE)
    for i, (skip, out) in enumerate([(1.0, 0.0), (0.5, math.sqrt(0.5))]):
        state = State(i, gaussian(0, torch.float64))
        x, sigma = run.model_input(state), run.sigmas[i]
        epsilon = (math.sqrt(sigma**2 + 1) * x - x0) / sigma
        assert torch.allclose(run.step(state, epsilon, noise)[0].sample, skip * x + out * x0, atol=1e-12)


def test_a_folder_saved_with_lcm_is_read_by_diffusers(small_model: Path, tmp_path: Path) -> None:
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    sd.defaults = replace(sd.defaults, sampler=Sampler("lcm"), num_inference_steps=4)
    sd.save_pretrained(tmp_path / "model")
    scheduler = LCMScheduler.from_pretrained(tmp_path / "model/scheduler")
    scheduler.set_timesteps(4)
    assert scheduler.config.prediction_type == sd.config.schedule.prediction_type
    *_, step = sd.denoise("a fox", seed=0)
    assert step.t == scheduler.timesteps[-1] and step.calls == 4


def test_known_numbers() -> None:
    schedule = Schedule()
    for n, first in ((20, 951), (25, 961), (30, 958), (50, 981)):
        for name in ("ddpm", "ddim", "pndm", "euler", "euler_a", "heun"):
            assert Sampler(name).plan(schedule, n).timesteps[0] == first
    assert [Sampler("dpmpp_2m").plan(schedule, n).timesteps[0] for n in (20, 25, 30, 50)] == [
        941,
        951,
        961,
        951,
    ]
    pndm = Sampler("pndm").plan(schedule, 50)
    assert pndm.timesteps[:4] == (981, 961, 961, 941) and pndm.calls == 51
    assert Sampler("heun").plan(schedule, 50).calls == 99
    ones = torch.ones(1)
    assert Sampler("euler").plan(schedule, 50).start(ones).sample.item() == pytest.approx(13.1585, abs=1e-4)
    assert Sampler("euler").plan(schedule, 20).start(ones).sample.item() == pytest.approx(11.0736, abs=1e-4)
    for spacing in ("trailing", "linspace"):
        assert Sampler("euler", spacing).plan(schedule, 20).start(ones).sample.item() == pytest.approx(14.614641)


def test_trailing_never_runs_below_zero() -> None:
    """diffusers makes 62 steps of 61, the last at t = −1."""
    for name in set(SAMPLERS) - {"lcm"}:
        run = Sampler(name, "trailing").plan(Schedule(), 61)
        assert run.timesteps[-1] >= 0 and len(set(run.timesteps)) == 61


# A Gaussian, whose score is known. For x₀ ~ N(μ, c²) the noise that the best denoiser predicts in σ-space is
# ε = σ (x̄ − μ) / (c² + σ²), and dx̄/dσ = ε is solved by x̄ − μ ∝ √(c² + σ²).

MU = 0.7


def predict_gaussian(run: Run, state: State, c: float) -> Tensor:
    sigma = run.sigmas[state.index]
    return sigma * (state.sample - MU) / (c**2 + sigma**2)


def error_at_last_call(run: Run, c: float) -> float:
    """The error of x̄ at the level of the last call (the jump from there to 0 is the same whatever n)."""
    state = run.start(torch.ones(1, dtype=torch.float64))
    scale = (state.sample.item() - MU) / math.hypot(c, run.sigmas[0])
    for _ in range(run.calls - 1):
        state, _ = run.step(state, predict_gaussian(run, state, c))
    return abs(state.sample.item() - MU - scale * math.hypot(c, run.sigmas[state.index]))


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(name: str, order: int) -> None:
    """Twice the steps make the error 2, or 4, times smaller."""
    sampler = Sampler(name, "linspace", karras=True)
    errors = [error_at_last_call(sampler.plan(Schedule(), n), c=0.5) for n in (100, 200, 400)]
    orders = [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]
    print(f"{name}: measured order {orders[-1]:.2f}")
    assert orders[-1] == pytest.approx(order, abs=0.15)


def table(readme: str, section: str) -> dict[str, list[str]]:
    """The table of samplers: calls for n steps, order, fresh noise, Karras' levels."""
    text = (Path(__file__).parents[2] / readme).read_text(encoding="utf-8").partition(f"## {section}\n")[2]
    lines = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name.strip("`"): rest for name, _, *rest in cells}


def error_at_199(sampler: Sampler, n: int) -> float:
    """The error of x̄ at t = 199, when the last call there begins (Heun's corrects what its first one predicted)."""
    run = sampler.plan(schedule_for(spacing="trailing"), n)
    state = run.start(torch.ones(1, dtype=torch.float64))
    scale = (state.sample.item() - MU) / math.hypot(0.5, run.sigmas[0])
    while 199 in run.timesteps[state.index + 1 :]:
        state, _ = run.step(state, predict_gaussian(run, state, 0.5))
    return abs(state.sample.item() - MU - scale * math.hypot(0.5, Schedule().sigma_at(199)))


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "heun", "dpmpp_2m"])
def test_order_is_what_the_readme_says(name: str) -> None:
    """On the model's own timesteps too, twice the steps make the error 2 or 4 times smaller.

    The grid decides whether that shows. 50, 100 and 200 trailing timesteps are whole and even, each grid is part of the
    next, and all visit t = 199: no step is rounded to a neighbour, no σ interpolated between two of the table, and the
    errors are of one level. (Linspace would round for DDIM and PNDM, and interpolate for the others.)
    """
    errors = [error_at_199(Sampler(name), n) for n in (50, 100, 200)]
    orders = [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]
    print(f"{name}: measured orders {orders[0]:.2f}, {orders[1]:.2f}; errors {errors}")
    assert orders[-1] == pytest.approx(float(table("README.md", "Samplers")[name][1]), abs=0.15)


def test_readme_tells_the_calls_the_noise_and_the_levels_of_every_sampler() -> None:
    english, chinese = table("README.md", "Samplers"), table("README.zh-CN.md", "采样器")
    assert [*english] == [*chinese] == [*SAMPLERS]
    formulas = {"n": lambda n: n, "n + 1": lambda n: n + 1, "2n − 1": lambda n: 2 * n - 1}
    for name, (calls, order, fresh, karras) in english.items():
        assert chinese[name][:2] == [calls, order]
        assert [cell == "是" for cell in chinese[name][2:]] == [cell == "yes" for cell in (fresh, karras)]
        for n in (2, 5, 20):
            run = Sampler(name).plan(Schedule(), n)
            assert run.calls == formulas[calls](n), (name, n)
            assert any(run.fresh) == (fresh == "yes")
        assert (order == "") == (fresh == "yes")  # with fresh noise there is no one path to be near to
        assert (karras == "yes") == can_take_karras(name)


def can_take_karras(name: str) -> bool:
    try:
        return Sampler(name, karras=True).karras
    except ValueError:
        return False


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_one_known_picture_is_found_exactly(name: str, spacing: str) -> None:
    """One picture in the world (c = 0): the path is a straight line, and every method follows it exactly."""
    run = Sampler(name, spacing).plan(Schedule(), 7)
    state = run.start(gaussian(0, torch.float64))
    line = (state.sample - MU) / run.sigmas[0]
    for _ in range(run.calls):
        state, x0 = run.step(state, predict_gaussian(run, state, c=0))
        assert torch.allclose(x0, torch.full_like(x0, MU), atol=1e-12)
        expected = MU + run.sigmas[state.index] * line
        assert torch.allclose(state.sample, expected, atol=1e-12)


@pytest.mark.parametrize(
    "sampler", [Sampler("ddpm"), Sampler("euler_a"), *(Sampler("ddim", eta=e) for e in (0.3, 1.0))]
)
def test_fresh_noise_keeps_every_level_at_its_variance(sampler: Sampler) -> None:
    """c = 0: a step maps x̄ to a x̄ + b + s z; from variance σ² that must give exactly σ'²."""
    run = sampler.plan(Schedule(), 10)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)

    def moved(i: int, sample: Tensor, noise: Tensor) -> float:
        state = State(i, sample)
        return run.step(state, predict_gaussian(run, state, c=0), noise)[0].sample.item()

    for i in range(run.calls):
        base = moved(i, zero, zero)
        a, s = moved(i, one, zero) - base, moved(i, zero, one) - base
        variance = a**2 * run.sigmas[i] ** 2 + s**2
        assert variance == pytest.approx(run.sigmas[i + 1] ** 2, rel=1e-9, abs=1e-12)
        assert (s > 0) == run.needs_noise(i)


def test_ddpm_is_the_posterior_of_ho_et_al() -> None:
    """Equations 6 and 7, with ᾱ and β written out in the variance-preserving scale."""
    run, schedule = Sampler("ddpm", "trailing").plan(Schedule(), 1000), Schedule()
    x, z, epsilon = (gaussian(seed, torch.float64) for seed in (1, 2, 3))
    for t in (1, 400, 998):
        i = 999 - t
        share, before, beta = schedule.alphas_cumprod[t], schedule.alphas_cumprod[t - 1], schedule.betas[t]
        x0 = (x - math.sqrt(1 - share) * epsilon) / math.sqrt(share)
        mean = math.sqrt(before) * beta / (1 - share) * x0 + math.sqrt(1 - beta) * (1 - before) / (1 - share) * x
        expected = mean + math.sqrt((1 - before) / (1 - share) * beta) * z
        state, ours = run.step(State(i, x / math.sqrt(share)), epsilon, z)
        assert torch.allclose(run.latents(state), expected, rtol=1e-9, atol=1e-12)
        assert torch.allclose(ours, x0, rtol=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_is_euler_in_sigma_space(prediction_type: str) -> None:
    """Equation 12 of DDIM (η = 0), in the variance-preserving scale, against Euler's run, in float64."""
    schedule = schedule_for(prediction_type)
    ddim, euler = Sampler("ddim").plan(schedule, 20), Sampler("euler").plan(schedule, 20)
    state, other = (run.start(gaussian(0, torch.float64)) for run in (ddim, euler))
    for t, following in zip(ddim.timesteps, (*ddim.timesteps[1:], None), strict=True):
        share = schedule.alphas_cumprod[int(t)]
        after = schedule.alphas_cumprod[0 if following is None else int(following)]
        x = ddim.model_input(state)
        assert torch.allclose(x, euler.model_input(other), atol=1e-12)
        prediction = unet(x, t)
        state, x0 = ddim.step(state, prediction)
        epsilon = (x - math.sqrt(share) * x0) / math.sqrt(1 - share)
        by_hand = math.sqrt(after) * x0 + math.sqrt(1 - after) * epsilon
        assert torch.allclose(ddim.latents(state), by_hand, atol=1e-6)
        other, _ = euler.step(other, prediction)
    assert torch.allclose(euler.latents(other), x0, atol=1e-12)


def test_extrapolating_v_costs_pndm_its_order() -> None:
    """Deviation 2, measured at t = 199 on the Gaussian: fed v, diffusers' PNDM is of first order only."""
    c, v = 0.5, schedule_for("v_prediction", "trailing")

    def velocity(x: Tensor, sigma: float) -> Tensor:
        signal = (sigma**2 + 1) ** -0.5
        epsilon = sigma * (x / signal - MU) / (c**2 + sigma**2)
        return signal * epsilon - sigma * signal * (x / signal - sigma * epsilon)

    def errors(n: int) -> tuple[float, float]:
        run, scheduler = Sampler("pndm").plan(v, n), theirs_for("pndm", "trailing", "v_prediction", n)
        scheduler.alphas_cumprod = torch.as_tensor(v.alphas_cumprod.copy())
        x = torch.ones(1, dtype=torch.float64)
        state = run.start(x)
        while run.timesteps[state.index] > 199:
            sigma = run.sigmas[state.index]
            x = scheduler.step(velocity(x, sigma), scheduler.timesteps[state.index], x).prev_sample
            state, _ = run.step(state, velocity(run.model_input(state), sigma))
        first, last = run.sigmas[0], run.sigmas[state.index]
        exact = MU + (math.hypot(1, first) - MU) / math.hypot(c, first) * math.hypot(c, last)
        return abs(state.sample.item() - exact), abs(x.item() * math.hypot(1, last) - exact)

    coarse, fine = errors(100), errors(200)
    ours, theirs = (math.log2(a / b) for a, b in zip(coarse, fine, strict=True))
    print(f"PNDM fed v: measured order {ours:.2f} (minisd), {theirs:.2f} (diffusers); errors {fine}")
    assert theirs == pytest.approx(1, abs=0.15)
    assert ours > 1.85
    assert fine[0] < fine[1] / 20


@pytest.mark.parametrize("name", SAMPLERS)
def test_runs_are_pure_and_interleave(name: str) -> None:
    """Two pictures drawn in turns by one run are those drawn one by one; no state changes under them."""
    run = Sampler(name).plan(schedule_for("v_prediction"), 6)
    noises = [gaussian(seed) for seed in range(7, 7 + run.calls)]

    def states(seed: int) -> Any:
        state = run.start(gaussian(seed))
        yield state
        for i, t in enumerate(run.timesteps):
            state, _ = run.step(state, unet(run.model_input(state), t), noises[i] if run.needs_noise(i) else None)
            yield state

    apart = [list(states(0)), list(states(1))]
    copies = [[state.sample.clone() for state in states] for states in apart]
    for i, pair in enumerate(zip(states(0), states(1), strict=True)):
        assert all(torch.equal(state.sample, apart[k][i].sample) for k, state in enumerate(pair))
    assert all(torch.equal(a.sample, b) for k in (0, 1) for a, b in zip(apart[k], copies[k], strict=True))
    with pytest.raises(FrozenInstanceError):
        run.first = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("name", SAMPLERS)
def test_half_precision_is_upcast(name: str) -> None:
    """float16 noise and predictions: the state is float32, and so is all arithmetic."""
    run = Sampler(name).plan(Schedule(), 5)
    half, state = gaussian(0).half(), run.start(gaussian(0).half())
    single = run.start(half.float())
    for i in range(run.calls):
        state, x0 = run.step(state, half, half if run.needs_noise(i) else None)
        single, _ = run.step(single, half.float(), half.float() if run.needs_noise(i) else None)
        assert state.sample.dtype == x0.dtype == run.latents(state).dtype == torch.float32
        assert torch.equal(state.sample, single.sample)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_noise_is_the_noise_predicted(prediction_type: str) -> None:
    run = Sampler("dpmpp_2m").plan(schedule_for(prediction_type), 5)
    state = run.start(gaussian(0, torch.float64))
    x, share = run.model_input(state), Schedule().alphas_cumprod[int(run.timesteps[0])]
    _, x0 = run.step(state, unet(x, 0))
    mixed = math.sqrt(share) * x0 + math.sqrt(1 - share) * run.noise(x, x0, 0)
    assert torch.allclose(mixed, x, atol=1e-12)


def test_end_of_ddim_and_pndm_follows_the_configuration() -> None:
    to_one = Schedule(replace(ScheduleConfig(), set_alpha_to_one=True))
    for name in SAMPLERS:
        assert Sampler(name).plan(to_one, 10).sigmas[-1] == 0
        last = Sampler(name).plan(Schedule(), 10).sigmas[-1]
        assert last == (pytest.approx(0.0291672, abs=1e-7) if name in ("ddim", "pndm") else 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "dpm"}, "choose one of ddpm, ddim, pndm, euler, euler_a, heun, dpmpp_2m"),
        ({"name": "ddim", "spacing": "even"}, "'leading', 'trailing', 'linspace'"),
        ({"name": "ddim", "karras": True}, "choose euler, heun, dpmpp_2m"),
        ({"name": "ddim", "eta": 1.5}, "from 0"),
        ({"name": "euler", "eta": 0.5}, "'ddim' only"),
        ({"name": "lcm", "spacing": "trailing"}, "timesteps of its own"),
    ],
)
def test_bad_samplers_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampler(**settings)


@pytest.mark.parametrize(
    ("sampler", "steps", "start", "words"),
    [
        (Sampler("ddim"), 0, 0, "from 1 to 1000"),
        (Sampler("ddim"), 1001, 0, "from 1 to 1000"),
        (Sampler("ddim"), 2.5, 0, "whole number"),
        (Sampler("lcm"), 51, 0, "from 1 to 50"),
        (Sampler("ddim"), 10, 10, "from 0 to 9"),
        (Sampler("ddim"), 10, -1, "from 0 to 9"),
        (Sampler("euler"), 1000, 0, "past the schedule's last"),
        (Sampler("dpmpp_2m", "linspace"), 1000, 0, "1001 timesteps"),
    ],
)
def test_bad_plans_are_refused(sampler: Sampler, steps: int, start: int, words: str) -> None:
    with pytest.raises(TypeError if steps == 2.5 else ValueError, match=words):
        sampler.plan(Schedule(), steps, start)


def test_misuse_of_a_run_is_refused() -> None:
    run = Sampler("euler_a").plan(Schedule(), 2)
    state = run.start(gaussian(0))
    with pytest.raises(ValueError, match="fresh noise"):
        run.step(state, gaussian(1))
    state, _ = run.step(state, gaussian(1), gaussian(2))
    state, _ = run.step(state, gaussian(1))
    with pytest.raises(ValueError, match="over after 2 calls"):
        run.step(state, gaussian(1))
    with pytest.raises(ValueError, match=r"start\(noise, latents\)"):
        Sampler("ddim").plan(Schedule(), 10, start=3).start(gaussian(0))
