"""The samplers against closed forms: their papers' equations, a Gaussian whose score is known, order of convergence."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from stand_ins import MU, SHAPE, SPACINGS, gaussian, predict_gaussian, schedule_for, unet
from torch import Tensor

from minisd import Sampler
from minisd.config import ScheduleConfig
from minisd.samplers import Plan, State
from minisd.schedule import Schedule

SAMPLERS = tuple(Sampler.functions)
STEPS = {"pndm": lambda n: n + 1, **dict.fromkeys(("heun", "dpmpp_sde"), lambda n: 2 * n - 1)}  # calls, where not n
FRESH = ("ddpm", "euler_a", "lcm", "dpmpp_2m_sde", "dpmpp_sde")


@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_and_fresh_noise(name):
    for n in (2, 5, 20):
        plan = Sampler(name).plan(Schedule(), n)
        assert plan.num_calls == STEPS.get(name, lambda n: n)(n)
        assert any(plan.sigma_up) == (name in FRESH)


@pytest.mark.parametrize("name", SAMPLERS)
def test_plans_are_finite_and_descend(name):
    """Or are refused: with any spacing and noise levels, from 1 to 1000 steps, from any step on."""
    for spacing, karras, n in product((None, *SPACINGS), (False, True), (1, 2, 3, 7, 50, 333, 999, 1000)):
        for start in {0, n // 2, n - 1}:
            try:
                plan = Sampler(name, spacing, karras).plan(Schedule(), n, start)
            except ValueError:
                continue
            assert all(map(math.isfinite, (*plan.timesteps, *plan.sigmas, *plan.sigma_up)))
            assert all(a >= b >= 0 for a, b in pairwise(plan.sigmas))
            assert all(0 <= t <= 999 for t in plan.timesteps)


def error_at_last_call(plan: Plan, c: float) -> float:
    """The error of x̄ at the level of the last call (the jump from there to 0 is the same whatever n)."""
    state = plan.start(torch.ones(1, dtype=torch.float64))
    scale = (state.sample.item() - MU) / math.hypot(c, plan.sigmas[0])
    for _ in range(plan.num_calls - 1):
        state, _ = plan.step(state, predict_gaussian(plan, state, c))
    return abs(state.sample.item() - MU - scale * math.hypot(c, plan.sigmas[state.index]))


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("deis", 2), ("unipc", 3)])
def test_order_of_convergence(name, order):
    """Twice the steps make the error 2, or 4, times smaller."""
    sampler = Sampler(name, "linspace", karras=True)
    errors = [error_at_last_call(sampler.plan(Schedule(), n), c=0.5) for n in (100, 200, 400)]
    orders = [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]
    print(f"{name}: measured order {orders[-1]:.2f}")
    assert orders[-1] == pytest.approx(order, abs=0.15)


def error_at_199(sampler: Sampler, n: int) -> float:
    """The error of x̄ at t = 199, when the last call there begins (Heun's corrects what its first one predicted)."""
    plan = sampler.plan(schedule_for(spacing="trailing"), n)
    state = plan.start(torch.ones(1, dtype=torch.float64))
    scale = (state.sample.item() - MU) / math.hypot(0.5, plan.sigmas[0])
    while 199 in plan.timesteps[state.index + 1 :]:
        state, _ = plan.step(state, predict_gaussian(plan, state, 0.5))
    return abs(state.sample.item() - MU - scale * math.hypot(0.5, Schedule().sigma_at(199)))


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "heun", "dpmpp_2m", "unipc", "deis"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_single_known_picture(name, spacing):
    """One picture in the world (c = 0): the path is a straight line, and every method follows it exactly."""
    plan = Sampler(name, spacing).plan(Schedule(), 7)
    state = plan.start(gaussian(0, torch.float64))
    line = (state.sample - MU) / plan.sigmas[0]
    for _ in range(plan.num_calls):
        state, x0 = plan.step(state, predict_gaussian(plan, state, c=0))
        assert torch.allclose(x0, torch.full_like(x0, MU), atol=1e-12)
        expected = MU + plan.sigmas[state.index] * line
        assert torch.allclose(state.sample, expected, atol=1e-12)


@pytest.mark.parametrize(
    "sampler", [Sampler("ddpm"), Sampler("euler_a"), *(Sampler("ddim", eta=e) for e in (0.3, 1.0))]
)
def test_variance_of_every_level(sampler):
    """c = 0: a step maps x̄ to a x̄ + b + s z; from variance σ² that must give exactly σ'²."""
    plan = sampler.plan(Schedule(), 10)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)

    def moved(i: int, sample: Tensor, noise: Tensor) -> float:
        state = State(i, sample)
        return plan.step(state, predict_gaussian(plan, state, c=0), noise)[0].sample.item()

    for i in range(plan.num_calls):
        base = moved(i, zero, zero)
        a, s = moved(i, one, zero) - base, moved(i, zero, one) - base
        variance = a**2 * plan.sigmas[i] ** 2 + s**2
        assert variance == pytest.approx(plan.sigmas[i + 1] ** 2, rel=1e-9, abs=1e-12)
        assert (s > 0) == plan.needs_noise(i)


def test_ddpm_posterior():
    """Equations 6 and 7, with ᾱ and β written out in the variance-preserving scale."""
    plan, schedule = Sampler("ddpm", "trailing").plan(Schedule(), 1000), Schedule()
    x, z, epsilon = (gaussian(seed, torch.float64) for seed in (1, 2, 3))
    for t in (1, 400, 998):
        i = 999 - t
        share, before, beta = schedule.alphas_cumprod[t], schedule.alphas_cumprod[t - 1], schedule.betas[t]
        x0 = (x - math.sqrt(1 - share) * epsilon) / math.sqrt(share)
        mean = math.sqrt(before) * beta / (1 - share) * x0 + math.sqrt(1 - beta) * (1 - before) / (1 - share) * x
        expected = mean + math.sqrt((1 - before) / (1 - share) * beta) * z
        state, ours = plan.step(State(i, x / math.sqrt(share)), epsilon, z)
        assert torch.allclose(plan.latents(state), expected, rtol=1e-9, atol=1e-12)
        assert torch.allclose(ours, x0, rtol=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_equals_euler_in_sigma_space(prediction_type):
    """Equation 12 of DDIM (η = 0), in the variance-preserving scale, against Euler's plan, in float64."""
    schedule = schedule_for(prediction_type)
    ddim, euler = Sampler("ddim").plan(schedule, 20), Sampler("euler").plan(schedule, 20)
    state, other = (plan.start(gaussian(0, torch.float64)) for plan in (ddim, euler))
    for t, following in zip(ddim.timesteps, (*ddim.timesteps[1:], None), strict=True):
        share = schedule.alphas_cumprod[int(t)]
        after = schedule.alphas_cumprod[0 if following is None else int(following)]
        x = ddim.latents(state)
        assert torch.allclose(x, euler.latents(other), atol=1e-12)
        prediction = unet(x, t)
        state, x0 = ddim.step(state, prediction)
        epsilon = (x - math.sqrt(share) * x0) / math.sqrt(1 - share)
        by_hand = math.sqrt(after) * x0 + math.sqrt(1 - after) * epsilon
        assert torch.allclose(ddim.latents(state), by_hand, atol=1e-6)
        other, _ = euler.step(other, prediction)
    assert torch.allclose(euler.latents(other), x0, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_plans_are_pure_and_interleave(name):
    """Two pictures drawn in turns by one plan are those drawn one by one; no state changes under them."""
    plan = Sampler(name).plan(schedule_for("v_prediction"), 6)
    noises = [gaussian(seed) for seed in range(7, 7 + plan.num_calls)]

    def states(seed: int) -> Any:
        state = plan.start(gaussian(seed))
        yield state
        for i, t in enumerate(plan.timesteps):
            state, _ = plan.step(state, unet(plan.latents(state), t), noises[i] if plan.needs_noise(i) else None)
            yield state

    apart = [list(states(0)), list(states(1))]
    copies = [[state.sample.clone() for state in states] for states in apart]
    for i, pair in enumerate(zip(states(0), states(1), strict=True)):
        assert all(torch.equal(state.sample, apart[k][i].sample) for k, state in enumerate(pair))
    assert all(torch.equal(a.sample, b) for k in (0, 1) for a, b in zip(apart[k], copies[k], strict=True))
    with pytest.raises(FrozenInstanceError):
        plan.init_noise_sigma = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("name", SAMPLERS)
def test_half_precision_is_upcast(name):
    """float16 noise and predictions: the state is float32, and so is all arithmetic."""
    plan = Sampler(name).plan(Schedule(), 5)
    half, state = gaussian(0).half(), plan.start(gaussian(0).half())
    single = plan.start(half.float())
    for i in range(plan.num_calls):
        state, x0 = plan.step(state, half, half if plan.needs_noise(i) else None)
        single, _ = plan.step(single, half.float(), half.float() if plan.needs_noise(i) else None)
        assert state.sample.dtype == x0.dtype == plan.latents(state).dtype == torch.float32
        assert torch.equal(state.sample, single.sample)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_predicted_noise(prediction_type):
    plan = Sampler("dpmpp_2m").plan(schedule_for(prediction_type), 5)
    state = plan.start(gaussian(0, torch.float64))
    x, share = plan.latents(state), Schedule().alphas_cumprod[int(plan.timesteps[0])]
    _, x0 = plan.step(state, unet(x, 0))
    mixed = math.sqrt(share) * x0 + math.sqrt(1 - share) * plan.noise(x, x0, 0)
    assert torch.allclose(mixed, x, atol=1e-12)


def test_final_sigma_of_ddim_and_pndm():
    to_one = Schedule(replace(ScheduleConfig(), set_alpha_to_one=True))
    for name in SAMPLERS:
        assert name == "deis" or Sampler(name).plan(to_one, 10).sigmas[-1] == 0
        last = Sampler(name).plan(Schedule(), 10).sigmas[-1]
        assert last == (pytest.approx(0.0291672, abs=1e-7) if name in ("ddim", "pndm", "deis") else 0)


def test_lcm_boundary_conditions():
    """The boundary conditions by hand: c_skip = 1 and c_out = 0 at t = 0; ½ and √½ at t = 1/20, where τ = σ_data."""
    plan = replace(Sampler("lcm").plan(Schedule(), 2), timesteps=(0.0, 0.05))
    x0, noise = gaussian(1, torch.float64), torch.zeros(SHAPE)
    for i, (skip, out) in enumerate([(1.0, 0.0), (0.5, math.sqrt(0.5))]):
        state = State(i, gaussian(0, torch.float64))
        x, sigma = plan.latents(state), plan.sigmas[i]
        epsilon = (math.sqrt(sigma**2 + 1) * x - x0) / sigma
        assert torch.allclose(plan.step(state, epsilon, noise)[0].sample, skip * x + out * x0, atol=1e-12)


def test_known_numbers():
    schedule = Schedule()
    for n, first in ((20, 951), (25, 961), (30, 958), (50, 981)):
        for name in ("ddpm", "ddim", "pndm", "euler", "euler_a", "heun"):
            assert Sampler(name, "leading").plan(schedule, n).timesteps[0] == first
            usual = first if name in ("ddpm", "ddim", "pndm") else 999
            assert Sampler(name).plan(schedule, n).timesteps[0] == usual
    plans = [Sampler("dpmpp_2m", "leading").plan(schedule, n) for n in (20, 25, 30, 50)]
    assert [plan.timesteps[0] for plan in plans] == [941, 951, 961, 951]
    pndm = Sampler("pndm").plan(schedule, 50)
    assert pndm.timesteps[:4] == (981, 961, 961, 941) and pndm.num_calls == 51
    assert Sampler("heun").plan(schedule, 50).num_calls == 99
    ones = torch.ones(1)
    for n, first_level in ((50, 13.1585), (20, 11.0736)):
        start = Sampler("euler", "leading").plan(schedule, n).start(ones)
        assert start.sample.item() == pytest.approx(first_level, abs=1e-4)
    for spacing in ("trailing", "linspace", None):
        assert Sampler("euler", spacing).plan(schedule, 20).start(ones).sample.item() == pytest.approx(14.614641)


def test_trailing_timesteps_stay_above_zero():
    """diffusers makes 62 steps of 61, the last at t = −1."""
    for name in set(SAMPLERS) - {"lcm"}:
        plan = Sampler(name, "trailing").plan(Schedule(), 61)
        assert plan.timesteps[-1] >= 0 and len(set(plan.timesteps)) == (121 if name == "dpmpp_sde" else 61)


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("pndm", 2), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_on_the_models_own_timesteps(name, order):
    """The grid decides whether the order shows. 50, 100 and 200 trailing timesteps are whole and even, each grid is
    part of the next, and all visit t = 199: no step is rounded to a neighbour, no σ interpolated between two of the
    table. (Linspace would round for DDIM and PNDM, and interpolate for the others.)
    """
    errors = [error_at_199(Sampler(name), n) for n in (50, 100, 200)]
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "dpm"},
        {"name": "ddim", "spacing": "even"},
        {"name": "ddim", "karras": True},
        {"name": "ddim", "eta": 1.5},
        {"name": "euler", "eta": 0.5},
        {"name": "euler_a", "eta": 0},
        {"name": "euler", "sigmas": "odd"},
        {"name": "ddim", "sigmas": "beta"},
        {"name": "euler", "karras": True, "sigmas": "beta"},
        {"name": "lcm", "spacing": "trailing"},
    ],
)
def test_bad_samplers(options):
    with pytest.raises(ValueError, match="choose one|expected|must be between|does not support"):
        Sampler(**options)


@pytest.mark.parametrize(
    ("sampler", "steps", "start"),
    [
        (Sampler("ddim"), 0, 0),
        (Sampler("ddim"), 1001, 0),
        (Sampler("lcm"), 51, 0),
        (Sampler("ddim"), 10, 10),
        (Sampler("ddim"), 10, -1),
        (Sampler("euler", "leading"), 1000, 0),
        (Sampler("dpmpp_2m", "linspace"), 1000, 0),
    ],
)
def test_bad_plans(sampler, steps, start):
    with pytest.raises(ValueError, match="must be|supports 1 to 50|go past timestep 999|does not support 1000 steps"):
        sampler.plan(Schedule(), steps, start)


def test_plan_errors_name_the_requested_steps():
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1, got 0"):
        Sampler("dpmpp_2m").plan(Schedule(), 0)
    for spacing, most in (("leading", 998), ("linspace", 999), ("trailing", 1000)):
        assert Sampler("dpmpp_2m", spacing).plan(Schedule(), most).num_calls == most
        with pytest.raises(ValueError, match=f"does not support {most + 1} steps with {spacing} spacing"):
            Sampler("dpmpp_2m", spacing).plan(Schedule(), most + 1)


def test_misuse_of_a_plan():
    plan = Sampler("euler_a").plan(Schedule(), 2)
    state = plan.start(gaussian(0))
    with pytest.raises(ValueError, match="`noise` is required"):
        plan.step(state, gaussian(1))
    state, _ = plan.step(state, gaussian(1), gaussian(2))
    state, _ = plan.step(state, gaussian(1))
    with pytest.raises(ValueError, match="complete after 2 calls"):
        plan.step(state, gaussian(1))
    with pytest.raises(ValueError, match=r"start\(noise, latents\)"):
        Sampler("ddim").plan(Schedule(), 10, start=3).start(gaussian(0))
