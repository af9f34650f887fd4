"""More samplers and noise levels, in addition to those of the core.

`MORE_SAMPLERS` and `LEVELS` list them. Like a sampler of the core, each is a function that returns a `Plan`; `Sampler`
selects one of either kind by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from minisd import samplers
from minisd.samplers import SAMPLERS, Advanced, Floats, Levels, Plan, State, ancestral, dpmpp_2m, euler
from minisd.schedule import Schedule


def extrapolate(plan: Plan, i: int, x0: Tensor, before: Tensor | None) -> Tensor:
    """Return the target D of DPM-Solver++ (2M), given x0 of this call and the one before; x0 in a first-order step."""
    sigmas = plan.sigmas
    if before is None or sigmas[i + 1] == 0:
        return x0
    # r = (λ − λ_before) / (λ' − λ),   D = x₀ + (x₀ − x₀_before) / 2r
    r = math.log(sigmas[i - 1] / sigmas[i]) / math.log(sigmas[i] / sigmas[i + 1])
    return x0 + (x0 - before) / (2 * r)


def dpmpp_2m_sde(schedule: Schedule, n: int, start: int = 0, spacing: str | None = None, levels: Levels = None) -> Plan:
    """Return a plan for SDE-DPM-Solver++ (2M): DPM++ 2M that replaces part of the noise by new noise at each step.

    Source: Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling", section 5 and appendix A.
    """

    def advance(plan: Plan, state: State, x0: Tensor, epsilon: Tensor, noise: Tensor | None) -> Advanced:
        i, sigmas, s = state.index, plan.sigmas, plan.sigma_up[state.index]
        target = extrapolate(plan, i, x0, state.history[0] if state.history else None)
        # x̄' = D + (σ'/σ)² (x̄ − D) + s z
        sample = target + (sigmas[i + 1] / sigmas[i]) ** 2 * (state.sample - target)
        return (sample + s * noise if noise is not None and s > 0 else sample), (x0,)

    plan = dpmpp_2m(schedule, n, start, spacing, levels)
    return replace(plan, advance=advance, sigma_up=ancestral(plan.sigmas, eta=1))


def dpmpp_sde(schedule: Schedule, n: int, start: int = 0, spacing: str | None = None, levels: Levels = None) -> Plan:
    """Return a plan for DPM++ SDE, a single-step method of second order with two UNet calls per step.

    Even-numbered calls step to the midpoint in log σ, and odd-numbered calls repeat the whole step with x0 predicted
    there; the last step, to σ = 0, is a plain Euler step. Both parts of a step see the same Brownian motion W(σ).
    Source: the sampler `sample_dpmpp_sde` of k-diffusion, after Lu et al. 2022, "DPM-Solver++", appendix A.
    """

    def advance(plan: Plan, state: State, x0: Tensor, epsilon: Tensor, noise: Tensor | None) -> Advanced:
        i, after = state.index, plan.sigmas[state.index + 1]
        history: tuple[Tensor, ...] = ()
        if noise is None or after == 0:
            return x0, ()
        if i % 2 == 0:
            before, begin, z, history = state.sample, plan.sigmas[i], noise, (state.sample, noise)
        else:
            (before, first), begin, middle = state.history, plan.sigmas[i - 1], plan.sigmas[i]
            # W(σ) − W(σ') = (W(σ) − W(σ_mid)) + (W(σ_mid) − W(σ'))
            z = (math.sqrt(begin - middle) * first + math.sqrt(middle - after) * noise) / math.sqrt(begin - after)
        # x̄' = x₀ + (σ'/σ)² (x̄ − x₀) + s z
        return x0 + (after / begin) ** 2 * (before - x0) + plan.sigma_up[i] * z, history

    plan = euler(schedule, n, start, spacing, levels)
    sigmas, timesteps, sigma_up = [plan.sigmas[0]], [plan.timesteps[0]], list[float]()
    for begin, after, t in zip(plan.sigmas, plan.sigmas[1:-1], plan.timesteps[1:], strict=False):
        middle = math.sqrt(begin * after)
        sigmas += [middle, after]
        timesteps += [schedule.timestep_at(middle), t]
        sigma_up += [ancestral((begin, level), eta=1)[0] for level in (middle, after)]
    return replace(plan, advance=advance, timesteps=(*timesteps,), sigmas=(*sigmas, 0.0), sigma_up=(*sigma_up, 0.0))


def unipc(schedule: Schedule, n: int, start: int = 0, spacing: str | None = None, levels: Levels = None) -> Plan:
    """Return a plan for UniPC of order 2 with B₂(h): DPM++ 2M, each of whose steps is corrected by the x0 at its end.

    Source: Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models",
    section 3 and appendix F.
    """

    def correct(plan: Plan, i: int, x0: Tensor, history: tuple[Tensor, ...]) -> Tensor:
        """Repeat the step from call i − 1 to call i, given x0 at its end."""
        before, x0_begin, *earlier = history
        # with h = λ_i − λ_{i−1} and b₁, b₂ the moments of the exponential integrator
        h = math.log(plan.sigmas[i - 1] / plan.sigmas[i])
        share = math.expm1(-h)
        slope = (x0 - x0_begin) / 2
        if earlier:
            phi = share / -h - 1
            b1, b2 = phi / share, 2 * (phi / -h - 1 / 2) / share
            r = math.log(plan.sigmas[i - 1] / plan.sigmas[i - 2]) / h
            w = (b1 - b2) / (1 - r)
            slope = w * (earlier[0] - x0_begin) / r + (b1 - w) * (x0 - x0_begin)
        # x̄ = D + (σ'/σ) (x̄_before − D)
        target = x0_begin + slope
        return target + plan.sigmas[i] / plan.sigmas[i - 1] * (before - target)

    def advance(plan: Plan, state: State, x0: Tensor, epsilon: Tensor, noise: Tensor | None) -> Advanced:
        i, history = state.index, state.history
        sample = correct(plan, i, x0, history) if history else state.sample
        target = extrapolate(plan, i, x0, history[1] if history else None)
        history = (sample, x0, *history[1:2])
        return target + (plan.sigmas[i + 1] / plan.sigmas[i]) * (sample - target), history

    return replace(dpmpp_2m(schedule, n, start, spacing, levels), advance=advance)


def deis(schedule: Schedule, n: int, start: int = 0, spacing: str | None = None, levels: Levels = None) -> Plan:
    """Return a plan for DEIS of order 2: ε is extrapolated linearly in log σ, and integrated exactly.

    As in diffusers, it ends at σ of timestep 0 or, with other noise `levels`, repeats the smallest; the last step of
    fewer than 15 is first-order.
    Source: Zhang and Chen 2022, "Fast Sampling of Diffusion Models with Exponential Integrator", section 3 (log ρ).
    """

    def advance(plan: Plan, state: State, x0: Tensor, epsilon: Tensor, noise: Tensor | None) -> Advanced:
        i, (sigma, sigma_next) = state.index, plan.sigmas[state.index : state.index + 2]
        if not state.history or (n < 15 and i == plan.num_calls - 1):
            return state.sample + (sigma_next - sigma) * epsilon, (epsilon,)
        before = plan.sigmas[i - 1]
        # w = ∫ (log τ − log σ_before) / (log σ − log σ_before) dτ from σ to σ'
        upper, lower = (level * (math.log(level / before) - 1) for level in (sigma_next, sigma))
        w = (upper - lower) / math.log(sigma / before)
        # x̄' = x̄ + w ε + (σ' − σ − w) ε_before
        return state.sample + w * epsilon + (sigma_next - sigma - w) * state.history[0], (epsilon,)

    plan = dpmpp_2m(schedule, n, start, spacing, levels)
    final = float(schedule.sigmas[0]) if levels is None else plan.sigmas[-2]
    return replace(plan, advance=advance, sigmas=(*plan.sigmas[:-1], final))


def exponential_sigmas(largest: float, smallest: float, n: int) -> Floats:
    """Return n decreasing noise levels, evenly spaced in log σ."""
    return tuple(largest * (smallest / largest) ** (i / max(n - 1, 1)) for i in range(n))


def beta_sigmas(largest: float, smallest: float, n: int) -> Floats:
    """Return n decreasing noise levels, spaced as the quantiles of a Beta(0.6, 0.6) distribution: denser at both ends.

    Source: Lee et al. 2024, "Beta Sampling is All You Need", section 3.
    """
    quantiles = beta_quantiles(1 - np.arange(n) / max(n - 1, 1), 0.6)
    return tuple(float(smallest + share * (largest - smallest)) for share in quantiles)


def beta_quantiles(p: NDArray[np.float64], a: float) -> NDArray[np.float64]:
    """Return the quantiles of a symmetric Beta(a, a) distribution for probabilities p in [0, 1], by bisection."""
    k = np.arange(1, 64)
    # ∫₀ˣ tᵃ⁻¹ (1−t)ᵃ⁻¹ dt = xᵃ ∑ₖ cₖ xᵏ / (a + k),   cₖ = ∏_{j≤k} (j − a)/j;   x ≤ 1/2, so the series converges fast
    series = np.concatenate([[1 / a], np.cumprod((k - a) / k) / (a + k)])[::-1]

    def integral(x: NDArray[np.float64]) -> Any:
        return x**a * np.polyval(series, x)

    goal = 2 * np.minimum(p, 1 - p) * integral(np.array(0.5))
    low, high = np.zeros_like(p), np.full_like(p, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = integral(middle) < goal
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(p <= 0.5, low, 1 - low)


MORE_SAMPLERS: Mapping[str, Callable[..., Plan]] = MappingProxyType(
    {function.__name__: function for function in (dpmpp_2m_sde, dpmpp_sde, unipc, deis)}
)
LEVELS = MappingProxyType({"exponential": exponential_sigmas, "beta": beta_sigmas})
# Samplers on DPM-Solver's timesteps, which are whole numbers: those of other noise levels are rounded down, as by
# diffusers in float32.
WHOLE_TIMESTEPS = ("dpmpp_2m", "dpmpp_2m_sde", "unipc", "deis")


@dataclass(frozen=True)
class Sampler(samplers.Sampler):
    """A sampler of the core or of `MORE_SAMPLERS`, selected by name, and its options.

    Args:
        name, spacing, karras, eta: See `minisd.samplers.Sampler`.
        sigmas: Other noise levels than Karras et al.'s: "exponential" or "beta"; None for none.
    """

    sigmas: str | None = None
    functions: ClassVar[Mapping[str, Callable[..., Plan]]] = MappingProxyType({**SAMPLERS, **MORE_SAMPLERS})

    def __post_init__(self) -> None:
        if self.sigmas not in (None, *LEVELS):
            raise ValueError(f"invalid sigmas={self.sigmas!r}; expected {', '.join(map(repr, LEVELS))} or None")
        if self.sigmas is not None and self.karras:
            raise ValueError(f"sigmas={self.sigmas!r} and karras=True exclude each other; choose one")
        super().__post_init__()

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the sampler's function that are set."""
        return super().options | ({} if self.sigmas is None else {"levels": LEVELS[self.sigmas]})

    def plan(self, schedule: Schedule, num_inference_steps: int, start: int = 0) -> Plan:
        """Return a plan for a sampling run; see `minisd.samplers.Sampler.plan`."""
        plan = super().plan(schedule, num_inference_steps, start)
        if self.sigmas is None or self.name not in WHOLE_TIMESTEPS:
            return plan
        # float32 leaves a whole number just short of itself, so that the first timestep is 998
        timesteps = (max(schedule.timestep_at(sigma) - 1e-6, 0.0) for sigma in plan.sigmas[: plan.num_calls])
        return replace(plan, timesteps=tuple(float(int(t)) for t in timesteps))


def own_sampler(function: Callable[..., Plan], **options: Any) -> Sampler:
    """Return the sampler of a function like those of `samplers.py`, and its options.

    Raises ValueError for an option that the function does not take.
    """
    known = MappingProxyType({**Sampler.functions, function.__name__: function})
    kind: type[Sampler] = type("OwnSampler", (Sampler,), {"functions": known})
    return kind(function.__name__, **options)
