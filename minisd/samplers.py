"""Samplers: the rules that walk from pure noise to clean latents, one call of the UNet at a time.

All of them follow the same differential equation, written in σ-space, x̄ = x₀ + σ ε (see `schedule.py`):

    dx̄/dσ = ε(x̄, σ)          (Song et al. 2021, "DDIM", equation 14; Karras et al. 2022, equation 1)

from the largest σ down to 0. They differ in how they step along it, and in the fresh noise they add.

Each sampler is one function that plans a run: it decides the timesteps, the noise levels and the step function. The
plan is pure: its methods go from one state to a new one and change nothing in place, so runs can share it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from minisd.schedule import Schedule

Floats = tuple[float, ...]


@dataclass(frozen=True)
class State:
    """Where a run stands.

    Attributes:
        index: the next call, from 0.
        sample: the latents x̄ in σ-space, (n, 4, h, w), float32 (float64 if the noise was).
        history: what a multi-step method remembers of earlier calls.
    """

    index: int
    sample: Tensor
    history: tuple[Tensor, ...] = ()


Advanced = tuple[Tensor, tuple[Tensor, ...]]  # the next sample, and the history to remember
Advance = Callable[["Plan", State, Tensor, Tensor, Tensor | None], Advanced]


@dataclass(frozen=True)
class Plan:
    """A planned run. It holds no latents, so any number of pictures can share it.

    Attributes:
        schedule: the model's noise schedule.
        advance: the step function: (plan, state, x0, epsilon, unit noise) -> the next sample and history.
        timesteps: what the UNet is given, one for each call.
        sigmas: the noise level of each call, and the final one.
        sigma_up: how much fresh noise each call adds, in σ-space.
        init_noise_sigma: the factor from unit noise to the first sample.
        skips: whether steps were skipped at the noisy end, so that noise alone is no start.
    """

    schedule: Schedule
    advance: Advance
    timesteps: Floats
    sigmas: Floats
    sigma_up: Floats
    init_noise_sigma: float
    skips: bool

    @property
    def num_calls(self) -> int:
        """How often the UNet is called: once a step, but n + 1 times for PNDM and 2n − 1 times for Heun."""
        return len(self.timesteps)

    def start(self, noise: Tensor, latents: Tensor | None = None) -> State:
        """Return the state before the first call.

        Args:
            noise: unit Gaussian, (n, 4, h, w).
            latents: clean ones, (n or 1, 4, h, w), for image-to-image; they are noised to the run's first level.

        Raises:
            ValueError: the plan skips steps and there are no latents.
        """
        noise = noise.to(torch.promote_types(noise.dtype, torch.float32))
        if latents is not None:
            return State(0, latents.to(noise) + self.sigmas[0] * noise)
        if self.skips:
            raise ValueError("this plan skips steps, so noise alone is no start for it; pass start(noise, latents)")
        return State(0, self.init_noise_sigma * noise)

    def latents(self, state: State) -> Tensor:
        """Return a state's latents at the scale the UNet sees (variance-preserving), whatever the sampler."""
        # x = √ᾱ x̄ = x̄ / √(σ²+1)
        return state.sample / math.sqrt(self.sigmas[state.index] ** 2 + 1)

    def needs_noise(self, index: int) -> bool:
        """Tell whether the call of this index adds fresh noise."""
        return self.sigma_up[index] > 0

    def step(self, state: State, prediction: Tensor, noise: Tensor | None = None) -> tuple[State, Tensor]:
        """Go from the UNet's prediction at a state to the next state.

        Args:
            state: the UNet saw `latents(state)` at `timesteps[state.index]`.
            prediction: epsilon, v or x0, as the model's prediction type says, (n, 4, h, w), any float dtype.
            noise: unit Gaussian, (n, 4, h, w), where `needs_noise(state.index)`; ignored elsewhere.

        Returns:
            The next state, and the clean latents x0 that the prediction implies.

        Raises:
            ValueError: the run is over, or noise is needed and missing.
        """
        if state.index >= self.num_calls:
            raise ValueError(f"the run is over after {self.num_calls} calls; take its result from latents(state)")
        if noise is None and self.needs_noise(state.index):
            raise ValueError(f"call {state.index} adds fresh noise; pass a unit Gaussian, (n, 4, h, w)")
        sigma, dtype = self.sigmas[state.index], state.sample.dtype
        x0, epsilon = self.schedule.convert(prediction.to(dtype), self.latents(state), sigma)
        fresh = None if noise is None else noise.to(dtype)
        sample, history = self.advance(self, state, x0, epsilon, fresh)
        return State(state.index + 1, sample, history), x0

    def noise(self, latents: Tensor, x0: Tensor, index: int) -> Tensor:
        """Return the noise predicted by the call of this index, from what the UNet saw and the x0 of `step`."""
        # ε = (x − √ᾱ x₀) / √(1−ᾱ) = (√(σ²+1) x − x₀) / σ
        sigma = self.sigmas[index]
        return (math.sqrt(sigma**2 + 1) * latents - x0) / sigma


# In the equations of the step functions, σ is the level of the call and σ' the next one.


def first_order(plan: Plan, state: State, x0: Tensor, epsilon: Tensor, noise: Tensor | None) -> Advanced:
    """The step of DDPM, DDIM, Euler and Euler ancestral, with all, some or none of its noise drawn afresh.

    With s = 0 it is x̄ + (σ' − σ) ε: Euler's method on the equation above.
    Sources: Ho et al. 2020, algorithm 2; Song et al. 2021, equation 12; Karras et al. 2022, algorithm 1.
    """
    sigma_next, s = plan.sigmas[state.index + 1], plan.sigma_up[state.index]
    # x̄' = x₀ + √(σ'² − s²) ε + s z
    sample = x0 + math.sqrt(sigma_next**2 - s**2) * epsilon
    return (sample + s * noise if noise is not None and s > 0 else sample), ()


def ancestral(sigmas: Floats, eta: float) -> Floats:
    """The s of `first_order` for each call: none for η = 0, that of DDPM's posterior for η = 1.

    Source: Song et al. 2021, equation 16.
    """
    # s = η σ' √(1 − σ'²/σ²)
    return tuple(eta * after * math.sqrt(1 - (after / before) ** 2) for before, after in pairwise(sigmas))


def variance_preserving(sigma: float) -> float:
    """The factor from unit noise to a first sample whose latents have variance 1."""
    return math.sqrt(sigma**2 + 1)


def final_sigma(schedule: Schedule) -> float:
    """The last noise level of DDIM and PNDM: 0, or in Stable Diffusion 1 that of timestep 0, as it was trained."""
    return 0.0 if schedule.config.set_alpha_to_one else float(schedule.sigmas[0])


def ddpm(schedule: Schedule, n: int, start: int = 0, spacing: str | None = None) -> Plan:
    """DDPM, the original: fresh noise at every step; it needs many steps. Source: Ho et al. 2020, algorithm 2."""
    timesteps = schedule.timesteps(n, spacing)[start:]
    sigmas = (*map(schedule.sigma_at, timesteps), 0.0)
    sigma_up = ancestral(sigmas, eta=1)
    return Plan(schedule, first_order, timesteps, sigmas, sigma_up, variance_preserving(sigmas[0]), start > 0)


def ddim(schedule: Schedule, n: int, start: int = 0, spacing: str | None = None, eta: float = 0.0) -> Plan:
    """DDIM: no fresh noise at eta 0, so one noise is one picture. Source: Song et al. 2021, equation 12."""
    timesteps = schedule.timesteps(n, spacing)[start:]
    sigmas = (*map(schedule.sigma_at, timesteps), final_sigma(schedule))
    sigma_up = ancestral(sigmas, eta)
    return Plan(schedule, first_order, timesteps, sigmas, sigma_up, variance_preserving(sigmas[0]), start > 0)


def euler_levels(schedule: Schedule, n: int, spacing: str | None, karras: bool = False) -> tuple[Floats, Floats, float]:
    """The timesteps, noise levels and first factor of Euler's and Heun's methods, which know fractional timesteps."""
    spacing = spacing or schedule.config.timestep_spacing
    timesteps = schedule.timesteps(n, spacing, rounded=False)
    sigmas = tuple(map(schedule.sigma_at, timesteps))
    if karras:
        sigmas = karras_sigmas(sigmas[0], sigmas[-1], n)
        timesteps = tuple(map(schedule.timestep_at, sigmas))
    return timesteps, sigmas, variance_preserving(sigmas[0]) if spacing == "leading" else sigmas[0]


def euler(schedule: Schedule, n: int, start: int = 0, spacing: str | None = None, karras: bool = False) -> Plan:
    """Euler: the plainest step in σ. Source: Karras et al. 2022, algorithm 1 without its second half."""
    timesteps, sigmas, factor = euler_levels(schedule, n, spacing, karras)
    sigmas = (*sigmas[start:], 0.0)
    return Plan(schedule, first_order, timesteps[start:], sigmas, ancestral(sigmas, eta=0), factor, start > 0)


def euler_a(schedule: Schedule, n: int, start: int = 0, spacing: str | None = None) -> Plan:
    """Euler ancestral: Euler's step with fresh noise at every step, as much as DDPM's."""
    timesteps, sigmas, factor = euler_levels(schedule, n, spacing)
    sigmas = (*sigmas[start:], 0.0)
    return Plan(schedule, first_order, timesteps[start:], sigmas, ancestral(sigmas, eta=1), factor, start > 0)


def heun(schedule: Schedule, n: int, start: int = 0, spacing: str | None = None, karras: bool = False) -> Plan:
    """Heun: an Euler step, a second call at its end, and the step again with the mean of both slopes.

    Calls 0, 2, 4 … predict and 1, 3, 5 … correct; the last, to σ = 0, is an Euler step alone.
    Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 1.
    """

    def advance(plan: Plan, state: State, x0: Tensor, epsilon: Tensor, noise: Tensor | None) -> Advanced:
        i, sigmas = state.index, plan.sigmas
        if i % 2 == 0:
            # x̄' = x̄ + (σ' − σ) ε
            return state.sample + (sigmas[i + 1] - sigmas[i]) * epsilon, (state.sample, epsilon)
        before, first_epsilon = state.history
        # x̄' = x̄ + (σ' − σ) (ε + ε') / 2
        return before + (sigmas[i] - sigmas[i - 1]) * (first_epsilon + epsilon) / 2, ()

    timesteps, sigmas, factor = euler_levels(schedule, n, spacing, karras)
    calls = [step for step in range(start, n) for _ in range(1 if step == start else 2)]
    sigmas = (*(sigmas[step] for step in calls), 0.0)
    timesteps = tuple(timesteps[step] for step in calls)
    return Plan(schedule, advance, timesteps, sigmas, (0.0,) * len(calls), factor, start > 0)


# The weights of Adams and Bashforth for two, three and four slopes, the newest first.
ADAMS_BASHFORTH = (
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def pndm(schedule: Schedule, n: int, start: int = 0, spacing: str | None = None) -> Plan:
    """PNDM as Stable Diffusion uses it (PLMS): Euler steps along a slope extrapolated from the last four ε.

    The first step has no past, so it is taken twice: once plainly, then with the mean of the slopes at both
    ends. That is why 50 steps make 51 calls.
    Source: Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds", equations 9 and 12.
    """

    def advance(plan: Plan, state: State, x0: Tensor, epsilon: Tensor, noise: Tensor | None) -> Advanced:
        i, sigmas = state.index, plan.sigmas
        if i == 0:
            return state.sample + (sigmas[1] - sigmas[0]) * epsilon, (epsilon, state.sample)
        if i == 1:
            first_epsilon, before = state.history
            return before + (sigmas[1] - sigmas[0]) * (first_epsilon + epsilon) / 2, (first_epsilon,)
        past = (epsilon, *state.history)[:4]
        # x̄' = x̄ + (σ' − σ) ∑ⱼ wⱼ ε₋ⱼ,   with w = (55, −59, 37, −9)/24 once four are known
        weights = ADAMS_BASHFORTH[len(past) - 2]
        slope = sum((w * e for w, e in zip(weights[1:], past[1:], strict=True)), weights[0] * epsilon)
        return state.sample + (sigmas[i + 1] - sigmas[i]) * slope, past

    timesteps = schedule.timesteps(n, spacing)[start:]
    timesteps = timesteps[:2] + timesteps[1:]
    sigmas = (*map(schedule.sigma_at, timesteps), final_sigma(schedule))
    sigma_up = (0.0,) * len(timesteps)
    return Plan(schedule, advance, timesteps, sigmas, sigma_up, variance_preserving(sigmas[0]), start > 0)


def dpmpp_2m(schedule: Schedule, n: int, start: int = 0, spacing: str | None = None, karras: bool = False) -> Plan:
    """DPM-Solver++ 2M: go towards an x0 extrapolated, along λ = −log σ, from the last two.

    The first step and the last, to σ = 0, use x0 alone, which is an Euler step.
    Source: Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling", algorithm 2.
    """

    def advance(plan: Plan, state: State, x0: Tensor, epsilon: Tensor, noise: Tensor | None) -> Advanced:
        i, sigmas = state.index, plan.sigmas
        target = x0
        if state.history and sigmas[i + 1] > 0:
            # r = (λ − λ_before) / (λ' − λ),   D = x₀ + (x₀ − x₀_before) / 2r
            r = math.log(sigmas[i - 1] / sigmas[i]) / math.log(sigmas[i] / sigmas[i + 1])
            target = x0 + (x0 - state.history[0]) / (2 * r)
        # x̄' = D + (σ'/σ) (x̄ − D)
        return target + (sigmas[i + 1] / sigmas[i]) * (state.sample - target), (x0,)

    if karras:
        sigmas = karras_sigmas(float(schedule.sigmas[-1]), float(schedule.sigmas[0]), n)
        timesteps = tuple(float(round(schedule.timestep_at(sigma))) for sigma in sigmas)
    else:
        spacing = spacing or schedule.config.timestep_spacing
        # except with trailing spacing, σ = 0 is one of the n + 1 evenly spaced points
        timesteps = schedule.timesteps(n if spacing == "trailing" else n + 1, spacing)[:n]
        sigmas = tuple(map(schedule.sigma_at, timesteps))
    factor, sigmas = variance_preserving(sigmas[0]), (*sigmas[start:], 0.0)
    return Plan(schedule, advance, timesteps[start:], sigmas, (0.0,) * (n - start), factor, start > 0)


LCM_GRID = 50  # the timesteps, evenly spaced, that a latent consistency model was distilled on
LCM_SIGMA_DATA = 0.5  # the standard deviation of the data, as the boundary conditions assume it
LCM_TIMESTEP_SCALING = 10.0  # the factor of the timestep in them


def lcm(schedule: Schedule, n: int, start: int = 0) -> Plan:
    """LCM: a model that jumps to clean latents in one call; each further call starts anew, from those and fresh noise.

    It is for models distilled to do so, or with a LoRA that makes one of a common model, in 1 to 8 steps.
    Sources: Luo et al. 2023, "Latent Consistency Models", section 4 and algorithm 3; Song et al. 2023, "Consistency
    Models", appendix C, for the boundary conditions.
    """

    def advance(plan: Plan, state: State, x0: Tensor, epsilon: Tensor, noise: Tensor | None) -> Advanced:
        # c_skip = σ_d² / (τ² + σ_d²),   c_out = τ / √(τ² + σ_d²),   with τ = 10 t: the identity at t = 0
        tau = LCM_TIMESTEP_SCALING * plan.timesteps[state.index]
        c_skip, c_out = LCM_SIGMA_DATA**2 / (tau**2 + LCM_SIGMA_DATA**2), tau / math.hypot(tau, LCM_SIGMA_DATA)
        # x̄' = c_skip x + c_out x₀ + σ' z
        clean, s = c_skip * plan.latents(state) + c_out * x0, plan.sigma_up[state.index]
        return (clean + s * noise if noise is not None and s > 0 else clean), ()

    if not 1 <= n <= LCM_GRID:
        raise ValueError(f"{n} steps of lcm; expected 1 to {LCM_GRID}")
    # n of the timesteps it was distilled on, from the last one on
    gap = schedule.config.num_train_timesteps // LCM_GRID
    timesteps = tuple(float((LCM_GRID - i * LCM_GRID // n) * gap - 1) for i in range(start, n))
    sigmas = (*map(schedule.sigma_at, timesteps), 0.0)
    return Plan(schedule, advance, timesteps, sigmas, sigmas[1:], variance_preserving(sigmas[0]), start > 0)


def karras_sigmas(largest: float, smallest: float, n: int, rho: float = 7.0) -> Floats:
    """n noise levels, from the largest to the smallest, even in σ^(1/ρ) (Karras et al. 2022, equation 5)."""
    # σ_i = (σ_max^(1/ρ) + i/(n−1) (σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ
    high, low = largest ** (1 / rho), smallest ** (1 / rho)
    return tuple((high + i / max(n - 1, 1) * (low - high)) ** rho for i in range(n))


SAMPLERS: Mapping[str, Callable[..., Plan]] = MappingProxyType(
    {function.__name__: function for function in (ddpm, ddim, pndm, euler, euler_a, heun, dpmpp_2m, lcm)}
)


@dataclass(frozen=True)
class Sampler:
    """A sampler by name, with the options that its function takes.

    Args:
        name: one of `SAMPLERS`.
        spacing: of the timesteps: "leading", "trailing", "linspace", or None for the schedule's own.
        karras: space the noise levels as Karras et al. 2022 do, denser near 0.
        eta: the share of fresh noise, from 0 to 1.

    Raises:
        ValueError: the sampler is unknown or does not take an option, or a value is out of range.
    """

    name: str
    spacing: str | None = None
    karras: bool = False
    eta: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in SAMPLERS:
            raise ValueError(f"unknown sampler {self.name!r}; choose one of {', '.join(SAMPLERS)}")
        if self.spacing not in (None, "leading", "trailing", "linspace"):
            raise ValueError(f"spacing={self.spacing!r}; expected 'leading', 'trailing', 'linspace' or None")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta!r}; expected 0 (no fresh noise) to 1 (as much as DDPM)")
        for option, value in self.options.items():
            able = [name for name, function in SAMPLERS.items() if option in inspect.signature(function).parameters]
            if self.name not in able:
                raise ValueError(f"sampler {self.name!r} takes no {option}={value!r}; these do: {', '.join(able)}")

    @property
    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        options = {"spacing": self.spacing, "karras": self.karras, "eta": self.eta}
        return {name: value for name, value in options.items() if value}

    def plan(self, schedule: Schedule, num_inference_steps: int, start: int = 0) -> Plan:
        """Plan a run.

        Args:
            schedule: the model's noise schedule.
            num_inference_steps: how many steps, counting the skipped ones.
            start: skip this many steps at the noisy end, for image-to-image.

        Raises:
            ValueError: the steps do not fit the schedule, or all of them are skipped.
        """
        if not 0 <= start < num_inference_steps:
            raise ValueError(f"start={start} of {num_inference_steps} steps; expected 0 to {num_inference_steps - 1}")
        return SAMPLERS[self.name](schedule, num_inference_steps, start, **self.options)
