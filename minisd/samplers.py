"""Samplers: turn pure noise into clean latents, one UNet call at a time.

Most samplers solve the probability-flow ODE, here in σ-space, where x̄ = x₀ + σ ε (see `schedule.py`),

    dx̄/dσ = ε(x̄, σ)          (Song et al. 2021, "DDIM", equation 14; Karras et al. 2022, equation 1)

from the largest σ down to 0 or that of timestep 0; DDPM and ancestral samplers solve the matching SDE, and LCM jumps
to the end of the ODE's path. They differ in discretization, order and noise. Each is a function that returns a `Plan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from minisd.schedule import Schedule

Floats = tuple[float, ...]
Levels = Callable[[float, float, int], Floats] | None  # (largest σ, smallest σ, n) -> n decreasing noise levels


@dataclass(frozen=True)
class State:
    """State of a sampling run between two UNet calls.

    Attributes:
        index: Zero-based index of the next UNet call.
        sample: Latents x̄ in σ-space, (n, 4, h, w), float32 (float64 if the noise is float64).
        history: Tensors that a multi-step method keeps from previous calls.
    """

    index: int
    sample: Tensor
    history: tuple[Tensor, ...] = ()


Advanced = tuple[Tensor, tuple[Tensor, ...]]  # next sample, history
Advance = Callable[["Plan", State, Tensor, Tensor, Tensor | None], Advanced]


@dataclass(frozen=True)
class Plan:
    """Timesteps, noise levels and step function of a sampling run. A plan holds no latents and can be reused.

    Attributes:
        schedule: Noise schedule of the model.
        advance: Step function, (plan, state, x0, epsilon, unit noise) -> (next sample, history).
        timesteps: Timestep passed to the UNet at each call.
        sigmas: Noise level σ at each call, followed by the final noise level.
        sigma_up: Standard deviation of the noise added after each call, in σ-space.
        init_noise_sigma: Standard deviation of the initial sample, in σ-space.
        skips: Whether the noisiest steps are skipped, in which case the run has to start from latents.
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
        """Number of UNet calls: n for n steps, except 2n − 1 for Heun and, if n > 1, n + 1 for PNDM."""
        return len(self.timesteps)

    def start(self, noise: Tensor, latents: Tensor | None = None) -> State:
        """Return the state before the first call.

        Args:
            noise: Unit Gaussian noise, (n, 4, h, w).
            latents: Clean latents for image-to-image, (n or 1, 4, h, w), noised to the first noise level of the plan.

        Raises:
            ValueError: If the plan skips steps and `latents` is None.
        """
        noise = noise.to(torch.promote_types(noise.dtype, torch.float32))
        if latents is not None:
            return State(0, latents.to(noise) + self.sigmas[0] * noise)
        if self.skips:
            raise ValueError("this plan skips steps and cannot start from pure noise; call start(noise, latents)")
        return State(0, self.init_noise_sigma * noise)

    def latents(self, state: State) -> Tensor:
        """Return the latents of a state at the variance-preserving scale of the UNet's input."""
        # x = √ᾱ x̄ = x̄ / √(σ²+1)
        return state.sample / math.sqrt(self.sigmas[state.index] ** 2 + 1)

    def needs_noise(self, index: int) -> bool:
        """Return whether the step after call `index` adds noise."""
        return self.sigma_up[index] > 0

    def step(self, state: State, prediction: Tensor, noise: Tensor | None = None) -> tuple[State, Tensor]:
        """Advance a state by one UNet call.

        Args:
            state: Current state.
            prediction: UNet output for `latents(state)` at `timesteps[state.index]`, (n, 4, h, w), any float dtype:
                epsilon, v or x0, depending on the prediction type of the schedule.
            noise: Unit Gaussian noise, (n, 4, h, w); required if `needs_noise(state.index)`, ignored otherwise.

        Returns:
            The next state and the predicted clean latents x0.

        Raises:
            ValueError: If the run is complete, or if noise is required but not given.
        """
        if state.index >= self.num_calls:
            raise ValueError(f"the run is complete after {self.num_calls} calls; get its result with latents(state)")
        if noise is None and self.needs_noise(state.index):
            raise ValueError(f"`noise` is required at call {state.index}; pass unit Gaussian noise, (n, 4, h, w)")
        sigma, dtype = self.sigmas[state.index], state.sample.dtype
        x0, epsilon = self.schedule.convert(prediction.to(dtype), self.latents(state), sigma)
        unit_noise = None if noise is None else noise.to(dtype)
        sample, history = self.advance(self, state, x0, epsilon, unit_noise)
        return State(state.index + 1, sample, history), x0

    def noise(self, latents: Tensor, x0: Tensor, index: int) -> Tensor:
        """Return the noise predicted at call `index`, given the UNet's input latents and the x0 returned by `step`."""
        # ε = (x − √ᾱ x₀) / √(1−ᾱ) = (√(σ²+1) x − x₀) / σ
        sigma = self.sigmas[index]
        return (math.sqrt(sigma**2 + 1) * latents - x0) / sigma


# Notation of the step functions: x̄, σ are the current sample and noise level, x̄', σ' the next ones; z is unit noise.


def first_order(plan: Plan, state: State, x0: Tensor, epsilon: Tensor, noise: Tensor | None) -> Advanced:
    """Take a first-order step, as DDPM, DDIM, Euler and Euler ancestral do; s is the standard deviation of fresh noise.

    For s = 0 this is x̄' = x̄ + (σ' − σ) ε, Euler's method for the ODE above.
    Sources: Ho et al. 2020, algorithm 2; Song et al. 2021, equation 12; Karras et al. 2022, algorithm 1.
    """
    sigma_next, s = plan.sigmas[state.index + 1], plan.sigma_up[state.index]
    # x̄' = x₀ + √(σ'² − s²) ε + s z
    sample = x0 + math.sqrt(sigma_next**2 - s**2) * epsilon
    return (sample + s * noise if noise is not None and s > 0 else sample), ()


def ancestral(sigmas: Floats, eta: float) -> Floats:
    """Return the noise standard deviation s of each step: 0 for η = 0, that of the DDPM posterior for η = 1.

    Source: Song et al. 2021, equation 16.
    """
    # s = η σ' √(1 − σ'²/σ²)
    return tuple(eta * after * math.sqrt(1 - (after / before) ** 2) for before, after in pairwise(sigmas))


def variance_preserving(sigma: float) -> float:
    """Return the initial standard deviation, in σ-space, for which the UNet's input has unit variance."""
    return math.sqrt(sigma**2 + 1)


def final_sigma(schedule: Schedule, default: bool) -> float:
    """Return the final noise level of DDIM and PNDM: 0 if `set_alpha_to_one`, otherwise that of timestep 0."""
    to_one = schedule.config.set_alpha_to_one
    return 0.0 if (default if to_one is None else to_one) else float(schedule.sigmas[0])


def ddpm(schedule: Schedule, n: int, start: int = 0, spacing: str | None = None) -> Plan:
    """Return a plan for DDPM, the original stochastic sampler, which needs many steps (Ho et al. 2020, algorithm 2)."""
    timesteps = schedule.timesteps(n, spacing)[start:]
    sigmas = (*map(schedule.sigma_at, timesteps), 0.0)
    sigma_up, scale = ancestral(sigmas, eta=1), variance_preserving(sigmas[0])
    return Plan(schedule, first_order, timesteps, sigmas, sigma_up=sigma_up, init_noise_sigma=scale, skips=start > 0)


def ddim(schedule: Schedule, n: int, start: int = 0, spacing: str | None = None, eta: float = 0.0) -> Plan:
    """Return a plan for DDIM, which is deterministic for eta=0. Source: Song et al. 2021, equation 12."""
    timesteps = schedule.timesteps(n, spacing)[start:]
    sigmas = (*map(schedule.sigma_at, timesteps), final_sigma(schedule, default=True))
    sigma_up, scale = ancestral(sigmas, eta), variance_preserving(sigmas[0])
    return Plan(schedule, first_order, timesteps, sigmas, sigma_up=sigma_up, init_noise_sigma=scale, skips=start > 0)


def euler_levels(schedule: Schedule, n: int, spacing: str | None, levels: Levels) -> tuple[Floats, Floats, float]:
    """Return the timesteps (which may be fractional), noise levels and initial standard deviation of Euler and Heun."""
    spacing = spacing or schedule.config.timestep_spacing or "linspace"
    timesteps = schedule.timesteps(n, spacing, rounded=False)
    sigmas = tuple(map(schedule.sigma_at, timesteps))
    if levels is not None:
        sigmas = levels(sigmas[0], sigmas[-1], n)
        timesteps = tuple(map(schedule.timestep_at, sigmas))
    # diffusers' convention: √(σ²+1) for leading spacing, which starts at a smaller σ; σ for the others
    return timesteps, sigmas, variance_preserving(sigmas[0]) if spacing == "leading" else sigmas[0]


def euler(schedule: Schedule, n: int, start: int = 0, spacing: str | None = None, levels: Levels = None) -> Plan:
    """Return a plan for Euler's method. Source: Karras et al. 2022, algorithm 1 without the second-order correction."""
    timesteps, sigmas, scale = euler_levels(schedule, n, spacing, levels)
    timesteps, sigmas = timesteps[start:], (*sigmas[start:], 0.0)
    return Plan(schedule, first_order, timesteps, sigmas, ancestral(sigmas, eta=0), scale, skips=start > 0)


def euler_a(schedule: Schedule, n: int, start: int = 0, spacing: str | None = None) -> Plan:
    """Return a plan for Euler ancestral, a stochastic Euler method that adds as much noise per step as DDPM."""
    timesteps, sigmas, scale = euler_levels(schedule, n, spacing, None)
    timesteps, sigmas = timesteps[start:], (*sigmas[start:], 0.0)
    return Plan(schedule, first_order, timesteps, sigmas, ancestral(sigmas, eta=1), scale, skips=start > 0)


def heun(schedule: Schedule, n: int, start: int = 0, spacing: str | None = None, levels: Levels = None) -> Plan:
    """Return a plan for Heun's method: an Euler step, redone with the mean of the slopes at its two ends.

    Even-numbered calls predict and odd-numbered calls correct; the last step, to σ = 0, is a plain Euler step.
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

    timesteps, sigmas, scale = euler_levels(schedule, n, spacing, levels)
    calls = [step for step in range(start, n) for _ in range(1 if step == start else 2)]
    sigmas = (*(sigmas[step] for step in calls), 0.0)
    timesteps, sigma_up = tuple(timesteps[step] for step in calls), (0.0,) * len(calls)
    return Plan(schedule, advance, timesteps, sigmas, sigma_up=sigma_up, init_noise_sigma=scale, skips=start > 0)


# Adams–Bashforth coefficients of order 2, 3 and 4, most recent slope first.
ADAMS_BASHFORTH = (
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def pndm(schedule: Schedule, n: int, start: int = 0, spacing: str | None = None) -> Plan:
    """Return a plan for PNDM in its PLMS variant, a linear multi-step method over the last four ε.

    The first step has no history, so it is a Heun step, with two UNet calls: 50 steps take 51 calls.
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
        # x̄' = x̄ + (σ' − σ) ∑ⱼ wⱼ ε₋ⱼ,   where w = (55, −59, 37, −9)/24 once four ε are available
        weights = ADAMS_BASHFORTH[len(past) - 2]
        slope = sum((w * e for w, e in zip(weights[1:], past[1:], strict=True)), weights[0] * epsilon)
        return state.sample + (sigmas[i + 1] - sigmas[i]) * slope, past

    timesteps = schedule.timesteps(n, spacing)[start:]
    timesteps = timesteps[:2] + timesteps[1:]
    sigmas = (*map(schedule.sigma_at, timesteps), final_sigma(schedule, default=False))
    sigma_up, scale = (0.0,) * len(timesteps), variance_preserving(sigmas[0])
    return Plan(schedule, advance, timesteps, sigmas, sigma_up=sigma_up, init_noise_sigma=scale, skips=start > 0)


def dpmpp_2m(schedule: Schedule, n: int, start: int = 0, spacing: str | None = None, levels: Levels = None) -> Plan:
    """Return a plan for DPM-Solver++ (2M), which extrapolates x0 in λ = −log σ from the last two predictions.

    The first step and the last one, to σ = 0, are first-order, and thus Euler steps.
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

    if levels is not None:  # diffusers' convention: over the entire schedule, regardless of spacing
        sigmas = levels(float(schedule.sigmas[-1]), float(schedule.sigmas[0]), n)
        timesteps = tuple(float(round(schedule.timestep_at(sigma))) for sigma in sigmas)
    else:
        spacing = spacing or schedule.config.timestep_spacing or "linspace"
        try:
            # diffusers' convention: n + 1 timesteps, the last replaced by σ = 0, except for trailing spacing
            timesteps = schedule.timesteps(n if spacing == "trailing" else n + 1, spacing)[:n]
        except ValueError as error:
            raise ValueError(f"this sampler does not support {n} steps with {spacing} spacing; use fewer") from error
        sigmas = tuple(map(schedule.sigma_at, timesteps))
    scale, sigma_up = variance_preserving(sigmas[0]), (0.0,) * (n - start)
    timesteps, sigmas = timesteps[start:], (*sigmas[start:], 0.0)
    return Plan(schedule, advance, timesteps, sigmas, sigma_up=sigma_up, init_noise_sigma=scale, skips=start > 0)


LCM_GRID = 50  # number of evenly spaced timesteps used in distillation
LCM_SIGMA_DATA = 0.5  # standard deviation of the data in the boundary conditions
LCM_TIMESTEP_SCALING = 10.0  # timestep scaling in the boundary conditions


def lcm(schedule: Schedule, n: int, start: int = 0) -> Plan:
    """Return a plan for LCM sampling: each call jumps to clean latents, which are then noised to the next level.

    It requires a latent consistency model, or an LCM-LoRA on a regular model, and works best with 1 to 8 steps.
    Sources: Luo et al. 2023, "Latent Consistency Models", section 4, algorithm 3 and the released code; Song et al.
    2023, "Consistency Models", appendix C, for the boundary conditions, there with σ_d as a factor of c_out.
    """

    def advance(plan: Plan, state: State, x0: Tensor, epsilon: Tensor, noise: Tensor | None) -> Advanced:
        # c_skip = σ_d² / (τ² + σ_d²),   c_out = τ / √(τ² + σ_d²),   where τ = 10 t (identity at t = 0)
        tau = LCM_TIMESTEP_SCALING * plan.timesteps[state.index]
        c_skip, c_out = LCM_SIGMA_DATA**2 / (tau**2 + LCM_SIGMA_DATA**2), tau / math.hypot(tau, LCM_SIGMA_DATA)
        # x̄' = c_skip x + c_out x₀ + σ' z
        clean, s = c_skip * plan.latents(state) + c_out * x0, plan.sigma_up[state.index]
        return (clean + s * noise if noise is not None and s > 0 else clean), ()

    if not 1 <= n <= LCM_GRID:
        raise ValueError(f"lcm supports 1 to {LCM_GRID} steps, got {n}")
    # n of the timesteps used in distillation, starting from the last
    gap = schedule.config.num_train_timesteps // LCM_GRID
    timesteps = tuple(float((LCM_GRID - i * LCM_GRID // n) * gap - 1) for i in range(start, n))
    sigmas = (*map(schedule.sigma_at, timesteps), 0.0)
    sigma_up, scale = sigmas[1:], variance_preserving(sigmas[0])
    return Plan(schedule, advance, timesteps, sigmas, sigma_up=sigma_up, init_noise_sigma=scale, skips=start > 0)


def karras_sigmas(largest: float, smallest: float, n: int, rho: float = 7.0) -> Floats:
    """Return n decreasing noise levels, evenly spaced in σ^(1/ρ) (Karras et al. 2022, equation 5)."""
    # σ_i = (σ_max^(1/ρ) + i/(n−1) (σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ
    high, low = largest ** (1 / rho), smallest ** (1 / rho)
    return tuple((high + i / max(n - 1, 1) * (low - high)) ** rho for i in range(n))


SAMPLERS: Mapping[str, Callable[..., Plan]] = MappingProxyType(
    {function.__name__: function for function in (ddpm, ddim, pndm, euler, euler_a, heun, dpmpp_2m, lcm)}
)


@dataclass(frozen=True)
class Sampler:
    """A sampler, selected by name, and its options.

    Args:
        name: Name of the sampler, a key of `functions`.
        spacing: Timestep spacing, "leading", "trailing" or "linspace"; None uses that of the schedule or, if it has
            none, diffusers' default: "leading" for DDPM, DDIM and PNDM, "linspace" for the others. LCM has none.
        karras: Whether to use the noise levels of Karras et al. 2022, which are denser near 0.
        eta: Amount of noise added at each DDIM step, from 0 (deterministic, the default) to 1 (as in DDPM).

    Raises:
        ValueError: If the sampler is unknown, does not support an option, or an option has an invalid value.
    """

    name: str
    spacing: str | None = None
    karras: bool = False
    eta: float | None = None
    functions: ClassVar[Mapping[str, Callable[..., Plan]]] = SAMPLERS

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in self.functions:
            raise ValueError(f"unknown sampler {self.name!r}; choose one of {', '.join(self.functions)}")
        if self.spacing not in (None, "leading", "trailing", "linspace"):
            raise ValueError(f"invalid spacing={self.spacing!r}; expected 'leading', 'trailing', 'linspace' or None")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be between 0 (deterministic) and 1 (as in DDPM), got {self.eta!r}")
        for option, value in self.options.items():
            if option not in signature(self.functions[self.name]).parameters:
                names = [name for name, function in self.functions.items() if option in signature(function).parameters]
                label = getattr(value, "__name__", f"{option}={value!r}")
                raise ValueError(f"{self.name!r} does not support {label}; supported by: {', '.join(names)}")

    @property
    def options(self) -> dict[str, Any]:
        """The options that were set, as keyword arguments of the sampler's function."""
        options = {"spacing": self.spacing, "levels": karras_sigmas if self.karras else None, "eta": self.eta}
        return {name: value for name, value in options.items() if value is not None}

    def plan(self, schedule: Schedule, num_inference_steps: int, start: int = 0) -> Plan:
        """Return a plan for a sampling run.

        Args:
            schedule: Noise schedule of the model.
            num_inference_steps: Number of denoising steps, including skipped ones.
            start: Number of steps to skip at the noisy end, for image-to-image.

        Raises:
            ValueError: If the schedule does not support this number of steps, or if every step is skipped.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        if not 0 <= start < num_inference_steps:
            raise ValueError(f"start must be between 0 and {num_inference_steps - 1}, got {start}")
        return self.functions[self.name](schedule, num_inference_steps, start, **self.options)
