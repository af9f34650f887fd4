"""The noise schedule, against diffusers' tables, published numbers and closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from minisd.config import ScheduleConfig
from minisd.schedule import Schedule

SD = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
}
SHAPE = (5, 4, 3, 2)


def random(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_published_numbers():
    schedule = Schedule()
    assert schedule.alphas_cumprod[0] == pytest.approx(0.99915, abs=1e-9)
    assert schedule.alphas_cumprod[999] == pytest.approx(0.0046601, abs=1e-7)
    assert schedule.sigmas[0] == pytest.approx(0.0291672, abs=1e-7)
    assert schedule.sigmas[999] == pytest.approx(14.614641, abs=2e-5)


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
def test_tables_are_those_of_diffusers(beta_schedule):
    schedule = Schedule(ScheduleConfig(beta_schedule=beta_schedule))
    theirs: Any = DDPMScheduler(**SD | {"beta_schedule": beta_schedule})
    assert np.allclose(schedule.betas, theirs.betas.double().numpy(), rtol=1e-6, atol=0)
    assert np.allclose(schedule.alphas_cumprod, theirs.alphas_cumprod.double().numpy(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_are_those_of_diffusers(spacing):
    whole: Any = DDIMScheduler(**SD, timestep_spacing=spacing)
    fractional: Any = EulerDiscreteScheduler(
        **{k: v for k, v in SD.items() if k != "clip_sample"}, timestep_spacing=spacing
    )
    for n in [*range(1, 61), 100, 250, 333, 500]:
        whole.set_timesteps(n)
        fractional.set_timesteps(n)
        assert Schedule().timesteps(n, spacing) == tuple(whole.timesteps.tolist())
        ours = Schedule().timesteps(n, spacing, rounded=False)
        assert np.allclose(ours, fractional.timesteps.numpy(), rtol=1e-6, atol=1e-6)


def test_first_timesteps_of_leading_spacing():
    assert [Schedule().timesteps(n)[0] for n in (20, 25, 30, 50, 1)] == [951, 961, 958, 981, 1]


def test_trailing_spacing_gives_as_many_timesteps_as_asked():
    """diffusers gives n + 1 of them for n = 61, 103, 121 …, the last being -1."""
    for n in range(1, 1001):
        timesteps = Schedule().timesteps(n, "trailing")
        assert len(timesteps) == n and timesteps[0] == 999 and timesteps[-1] >= 0
        assert all(a > b for a, b in zip(timesteps[:-1], timesteps[1:], strict=True))


def test_one_jump_is_many_single_steps():
    """q(x_t | x0): the mean and variance of x_t = √(1−β) x_{t−1} + √β z, followed one timestep at a time."""
    schedule = Schedule()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    mean, variance, one = 1.0, 0.0, torch.ones(1, dtype=torch.float64)
    for t, beta in enumerate(betas.tolist()):
        mean, variance = mean * (1 - beta) ** 0.5, variance * (1 - beta) + beta
        at = torch.tensor([t])
        assert schedule.add_noise(one, 0 * one, at).item() == pytest.approx(mean, rel=1e-12)
        assert schedule.add_noise(0 * one, one, at).item() == pytest.approx(variance**0.5, rel=1e-12)


def test_noise_velocity_and_snr_are_those_of_diffusers():
    t, x0, noise = torch.tensor([0, 1, 500, 998, 999]), random(0), random(1)
    theirs: Any = DDPMScheduler(**SD)
    v = Schedule(ScheduleConfig(prediction_type="v_prediction"))
    assert torch.allclose(v.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), atol=2e-6)
    assert torch.allclose(v.target(x0, noise, t), theirs.get_velocity(x0, noise, t), atol=2e-6)
    assert v.snr(t).dtype == torch.float32
    ratio = theirs.alphas_cumprod[t] / (1 - theirs.alphas_cumprod[t])
    assert torch.allclose(v.snr(t), ratio, rtol=3e-5)
    assert Schedule().target(x0, noise, t) is noise
    assert Schedule(ScheduleConfig(prediction_type="sample")).target(x0, noise, t) is x0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_conversions_give_back_what_was_mixed(prediction_type):
    schedule = Schedule(ScheduleConfig(prediction_type=prediction_type))
    t, x0, noise = torch.tensor([0, 1, 500, 998, 999]), random(0, torch.float64), random(1, torch.float64)
    noisy, prediction = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
    assert torch.allclose(schedule.to_x0(prediction, noisy, t), x0, atol=1e-12)
    assert torch.allclose(schedule.to_epsilon(prediction, noisy, t), noise, atol=1e-12)
    for i, step in enumerate(t.tolist()):
        clean, epsilon = schedule.convert(prediction[i], noisy[i], schedule.sigma_at(step))
        assert torch.allclose(clean, x0[i], atol=1e-12) and torch.allclose(epsilon, noise[i], atol=1e-12)


def test_sigma_and_timestep_are_each_others_inverse():
    schedule = Schedule()
    for t in (0, 1, 17, 500, 999):
        assert schedule.sigma_at(t) == schedule.sigmas[t]
        assert schedule.timestep_at(schedule.sigma_at(t)) == pytest.approx(t, abs=1e-9)
    between = (schedule.sigmas[17] * schedule.sigmas[18]) ** 0.5
    assert schedule.timestep_at(between) == pytest.approx(17.5, abs=1e-9)
    assert (schedule.timestep_at(0), schedule.timestep_at(1e3)) == (0, 999)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_of_the_latents_is_kept(dtype):
    schedule, t = (Schedule(ScheduleConfig(prediction_type="v_prediction")), torch.tensor([0, 1, 500, 998, 999]))
    x0, noise = random(0).to(dtype), random(1).to(dtype)
    exact = schedule.add_noise(x0.double(), noise.double(), t)
    noisy = schedule.add_noise(x0, noise, t)
    assert noisy.dtype == dtype
    assert torch.allclose(noisy.double(), exact, atol=4 * torch.finfo(dtype).eps)
    for convert in (schedule.target, schedule.to_x0, schedule.to_epsilon):
        assert convert(x0, noise, t).dtype == dtype


def test_no_float64_reaches_a_device():
    """Some devices (MPS) have none: with float32 latents on one, nothing float64 may be there."""

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves((args, out)):
                assert not (isinstance(x, torch.Tensor) and x.is_meta and x.dtype == torch.float64)
            return out

    x = torch.empty(SHAPE, device="meta")
    with Watch():
        t = torch.zeros(5, dtype=torch.long, device="meta")
        assert Schedule().add_noise(x, x, t).device.type == "meta"
        assert Schedule().snr(t).dtype == torch.float32


def test_tables_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        Schedule().betas[0] = 1.0


@pytest.mark.parametrize(
    ("n", "spacing", "words"),
    [
        (0, "leading", "between 1 and 1000, got 0"),
        (1001, "trailing", "between 1 and 1000, got 1001"),
        (1000, "leading", "go past timestep 999"),
        (10, "middle", "'leading', 'trailing' or 'linspace'"),
    ],
)
def test_errors_say_what_to_do(n, spacing, words):
    with pytest.raises(ValueError, match=words):
        Schedule().timesteps(n, spacing)
