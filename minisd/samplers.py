"""Samplers: the rules that walk from pure noise to clean latents, one call of the UNet at a time.

All of them follow the same differential equation, written in σ-space, x̄ = x₀ + σ ε (see `schedule.py`):

    dx̄/dσ = ε(x̄, σ)          (Song et al. 2021, "DDIM", equation 14; Karras et al. 2022, equation 1)

from the largest σ down to 0. They differ in how they step along it, and in the fresh noise they add.

A `Sampler` is a frozen description. Its `plan` decides every number of a run beforehand, as Python floats.
The methods of the `Run` are then pure functions: from one state to a new one, nothing changes in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from minisd.pipeline.checks import real, whole
from minisd.schedule import Schedule


@dataclass(frozen=True)
class State:
    """Where a run stands.

    index: the next call, from 0. sample: the latents x̄ in σ-space, (n, 4, h, w), float32 (float64 if the
    noise was). history: what a multi-step method remembers of earlier calls.
    """

    index: int
    sample: Tensor
    history: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Run:
    """A planned run of a sampler, made by `Sampler.plan`. It holds no latents, so many pictures can share it.

    timesteps: what the UNet is given, one for each call. sigmas: the noise level of each call, and the final
    one. fresh: how much fresh noise each call adds, in σ-space. first: the factor from unit noise to the
    first sample; None where the run skips steps, and so cannot begin with noise alone.
    """

    name: str
    schedule: Schedule
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    fresh: tuple[float, ...]
    first: float | None

    @property
    def calls(self) -> int:
        """How often the UNet is called: once a step, but n + 1 times for PNDM and 2n − 1 times for Heun."""
        return len(self.timesteps)

    def start(self, noise: Tensor, latents: Tensor | None = None) -> State:
        """The state before the first call.

        noise: unit Gaussian, (n, 4, h, w). latents: clean ones, (n or 1, 4, h, w), for image-to-image; they
        are noised to the run's first level. A run that skips steps needs them: ValueError without.
        """
        noise = noise.to(torch.promote_types(noise.dtype, torch.float32))
        if latents is not None:
            return State(0, latents.to(noise) + self.sigmas[0] * noise)
        if self.first is None:
            raise ValueError("this run skips steps, so noise alone is no start for it; pass start(noise, latents)")
        return State(0, self.first * noise)

    def model_input(self, state: State) -> Tensor:
        """What the UNet sees at this state's call, in the state's dtype: cast it to the model's precision."""
        return self.latents(state)

    def latents(self, state: State) -> Tensor:
        """The latents of a state, variance-preserving (the model's own scale), whatever the sampler."""
        # x = √ᾱ x̄ = x̄ / √(σ²+1)
        return state.sample / math.sqrt(self.sigmas[state.index] ** 2 + 1)

    def needs_noise(self, index: int) -> bool:
        """Whether the call of this index adds fresh noise."""
        return self.fresh[index] > 0

    def step(self, state: State, prediction: Tensor, noise: Tensor | None = None) -> tuple[State, Tensor]:
        """From the UNet's prediction at this state to the next state, and the clean latents x0 it implies.

        prediction: what the model's prediction type says (epsilon, v or sample), (n, 4, h, w), any float
        dtype. noise: unit Gaussian, (n, 4, h, w), where `needs_noise(state.index)`; ignored elsewhere.
        Raises ValueError after the last call, and when noise is needed and missing.
        """
        if state.index >= self.calls:
            raise ValueError(f"the run is over after {self.calls} calls; take its picture from latents(state)")
        if noise is None and self.needs_noise(state.index):
            raise ValueError(f"call {state.index} of {self.name!r} adds fresh noise; pass a unit Gaussian")
        sigma, dtype = self.sigmas[state.index], state.sample.dtype
        x0, epsilon = self.schedule.convert(prediction.to(dtype), self.model_input(state), sigma)
        fresh = None if noise is None else noise.to(dtype)
        sample, history = SAMPLERS[self.name].advance(self, state, x0, epsilon, fresh)
        return State(state.index + 1, sample, history), x0

    def noise(self, model_input: Tensor, x0: Tensor, index: int) -> Tensor:
        """The noise predicted by the call of this index, from what the UNet saw and the x0 of `step`."""
        # ε = (x − √ᾱ x₀) / √(1−ᾱ) = (√(σ²+1) x − x₀) / σ
        sigma = self.sigmas[index]
        return (math.sqrt(sigma**2 + 1) * model_input - x0) / sigma


# The step functions. Each takes the run, the state, x0 and epsilon as predicted at it, and unit noise; it
# returns the next sample and the history to remember. In the equations, σ is the call's level, σ' the next.

Stepped = tuple[Tensor, tuple[Tensor, ...]]


def first_order(run: Run, state: State, x0: Tensor, epsilon: Tensor, noise: Tensor | None) -> Stepped:
    """DDPM, DDIM, Euler and Euler ancestral: the same step, with all, some or none of its noise drawn afresh.

    With s = 0 it is x̄ + (σ' − σ) ε: Euler's method on the equation above.
    Sources: Ho et al. 2020, algorithm 2; Song et al. 2021, equation 12; Karras et al. 2022, algorithm 1.
    """
    level, s = run.sigmas[state.index + 1], run.fresh[state.index]
    # x̄' = x₀ + √(σ'² − s²) ε + s z
    sample = x0 + math.sqrt(level**2 - s**2) * epsilon
    return (sample + s * noise if noise is not None and s > 0 else sample), ()


def fresh_noise(sigma: float, sigma_next: float, eta: float) -> float:
    """The s of `first_order`: none for η = 0, that of DDPM's posterior for η = 1 (Song 2021, equation 16)."""
    # s = η σ' √(1 − σ'²/σ²)
    return eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)


def heun(run: Run, state: State, x0: Tensor, epsilon: Tensor, noise: Tensor | None) -> Stepped:
    """Heun: an Euler step, a second call at its end, and the step again with the mean of both slopes.

    Calls 0, 2, 4 … predict and 1, 3, 5 … correct; the last, to σ = 0, is an Euler step alone.
    Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", alg. 1.
    """
    i, sigmas = state.index, run.sigmas
    if i % 2 == 0:
        # x̄' = x̄ + (σ' − σ) ε
        return state.sample + (sigmas[i + 1] - sigmas[i]) * epsilon, (state.sample, epsilon)
    before, first_epsilon = state.history
    # x̄' = x̄ + (σ' − σ) (ε + ε') / 2
    return before + (sigmas[i] - sigmas[i - 1]) * (first_epsilon + epsilon) / 2, ()


# The weights of Adams and Bashforth for two, three and four slopes, the newest first.
ADAMS_BASHFORTH = (
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def plms(run: Run, state: State, x0: Tensor, epsilon: Tensor, noise: Tensor | None) -> Stepped:
    """PNDM as Stable Diffusion uses it (PLMS): Euler steps along a slope extrapolated from the last four ε.

    The first step has no past, so it is taken twice: once plainly, then with the mean of the slopes at both
    ends. That is why 50 steps make 51 calls.
    Source: Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds", equations 9 and 12.
    """
    i, sigmas = state.index, run.sigmas
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


def dpmpp_2m(run: Run, state: State, x0: Tensor, epsilon: Tensor, noise: Tensor | None) -> Stepped:
    """DPM-Solver++ 2M: go towards an x0 extrapolated, along λ = −log σ, from the last two.

    The first step and the last, to σ = 0, use x0 alone, which is an Euler step.
    Source: Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling", algorithm 2.
    """
    i, sigmas = state.index, run.sigmas
    aim = x0
    if state.history and sigmas[i + 1] > 0:
        # r = (λ − λ_before) / (λ' − λ),   D = x₀ + (x₀ − x₀_before) / 2r
        r = math.log(sigmas[i - 1] / sigmas[i]) / math.log(sigmas[i] / sigmas[i + 1])
        aim = x0 + (x0 - state.history[0]) / (2 * r)
    # x̄' = D + (σ'/σ) (x̄ − D)
    return aim + (sigmas[i + 1] / sigmas[i]) * (state.sample - aim), (x0,)


LCM_GRID = 50  # the timesteps, evenly spaced, that a latent consistency model was distilled on
LCM_DATA = 0.5  # the spread of the data, as the boundary conditions assume it
LCM_STRETCH = 10.0  # the factor of the timestep in them


def lcm(run: Run, state: State, x0: Tensor, epsilon: Tensor, noise: Tensor | None) -> Stepped:
    """LCM: a model that jumps to clean latents in one call; each further call starts anew, from those and fresh noise.

    It is for models distilled to do so, or a LoRA that makes one of a common model, in 1 to 8 steps.
    Sources: Luo et al. 2023, "Latent Consistency Models", section 4 and algorithm 3; Song et al. 2023, "Consistency
    Models", appendix C, for the boundary conditions.
    """
    # c_skip = σ_d² / (τ² + σ_d²),   c_out = τ / √(τ² + σ_d²),   with τ = 10 t: the identity at t = 0
    tau = LCM_STRETCH * run.timesteps[state.index]
    skip, out = LCM_DATA**2 / (tau**2 + LCM_DATA**2), tau / math.hypot(tau, LCM_DATA)
    # x̄' = c_skip x + c_out x₀ + σ' z
    clean, level = skip * run.model_input(state) + out * x0, run.fresh[state.index]
    return (clean + level * noise if noise is not None and level > 0 else clean), ()


@dataclass(frozen=True)
class Method:
    """What sets one sampler apart: its step function, and the habits it has in diffusers.

    karras: knows Karras' spacing of σ. continuous: linspace timesteps stay fractional, and except with
    leading spacing the first sample is σ ε, not √(σ²+1) ε. to_zero: ends at σ = 0 in any configuration;
    otherwise `set_alpha_to_one` decides between 0 and the first σ of the schedule.
    """

    description: str
    advance: Callable[[Run, State, Tensor, Tensor, Tensor | None], Stepped]
    karras: bool = False
    continuous: bool = False
    to_zero: bool = True


SAMPLERS: Mapping[str, Method] = MappingProxyType(
    {
        "ddpm": Method("the original, fresh noise at every step; wants many steps", first_order),
        "ddim": Method("no fresh noise (eta=0): one noise, one picture", first_order, to_zero=False),
        "pndm": Method("a slope from the last four calls; one call more than steps", plms, to_zero=False),
        "euler": Method("the plainest step in σ; knows Karras", first_order, karras=True, continuous=True),
        "euler_a": Method("Euler with fresh noise at every step", first_order, continuous=True),
        "heun": Method("second order, two calls a step; knows Karras", heun, karras=True, continuous=True),
        "dpmpp_2m": Method("second order, one call a step; knows Karras", dpmpp_2m, karras=True),
        "lcm": Method("1 to 8 steps, for latent consistency models and their LoRAs", lcm),
    }
)


@dataclass(frozen=True)
class Sampler:
    """The description of a sampler.

    name: one of `SAMPLERS`. spacing of the timesteps: "leading", "trailing", "linspace", or None for the
    schedule's own (and always for lcm, which has one of its own). karras: space σ as Karras et al. 2022 do, denser
    near 0 (euler, heun, dpmpp_2m). eta: for ddim, the share of fresh noise, from 0 to 1. Raises ValueError for
    anything else.
    """

    name: str
    spacing: str | None = None
    karras: bool = False
    eta: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in SAMPLERS:
            raise ValueError(f"sampler {self.name!r} is not known; choose one of {', '.join(SAMPLERS)}")
        if self.spacing not in (None, "leading", "trailing", "linspace"):
            raise ValueError(f"spacing={self.spacing!r}; expected 'leading', 'trailing', 'linspace', or None")
        if self.spacing and self.name == "lcm":
            raise ValueError(f"spacing={self.spacing!r}; sampler 'lcm' has timesteps of its own, so leave it out")
        if self.karras and not SAMPLERS[self.name].karras:
            able = ", ".join(name for name, method in SAMPLERS.items() if method.karras)
            raise ValueError(f"sampler {self.name!r} has no Karras spacing; drop it, or choose {able}")
        real("eta", self.eta, 0, 1, ": from no fresh noise to as much as DDPM")
        if self.eta and self.name != "ddim":
            raise ValueError(f"eta={self.eta} is for sampler 'ddim' only, not {self.name!r}; leave it at 0")

    def plan(self, schedule: Schedule, num_inference_steps: int, start: int = 0) -> Run:
        """Decide all numbers of a run. start: skip that many steps at the noisy end, for image-to-image.

        Raises ValueError when the steps do not fit the schedule or start leaves none of them, and TypeError for what
        is no whole number.
        """
        total = LCM_GRID if self.name == "lcm" else schedule.config.num_train_timesteps
        n = whole("num_inference_steps", num_inference_steps, 1, total)
        start = whole("start", start, 0, n - 1)
        method = SAMPLERS[self.name]
        timesteps, levels = self._levels(schedule, n)
        final = 0.0 if method.to_zero or schedule.config.set_alpha_to_one else float(schedule.sigmas[0])
        order = [step for step in range(start, n) for _ in range(self._calls(step - start))]
        sigmas = (*(levels[step] for step in order), final)
        eta = 1.0 if self.name in ("ddpm", "euler_a") else self.eta
        pairs = zip(sigmas[:-1], sigmas[1:], strict=True)
        leading = (self.spacing or schedule.config.timestep_spacing) == "leading"
        first = sigmas[0] if method.continuous and not leading else math.sqrt(sigmas[0] ** 2 + 1)
        return Run(
            name=self.name,
            schedule=schedule,
            timesteps=tuple(timesteps[step] for step in order),
            sigmas=sigmas,
            fresh=sigmas[1:] if self.name == "lcm" else tuple(fresh_noise(a, b, eta) for a, b in pairs),
            first=first if start == 0 else None,
        )

    def _calls(self, step: int) -> int:
        # Heun corrects at the end of each step but the last; PNDM at the end of its first
        return 2 if (self.name == "heun" and step > 0) or (self.name == "pndm" and step == 1) else 1

    def _levels(self, schedule: Schedule, n: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        # the timestep and the σ of each step; DPM++ counts σ = 0 among its points, as diffusers does
        if self.name == "dpmpp_2m" and self.karras:
            levels = karras_sigmas(float(schedule.sigmas[-1]), float(schedule.sigmas[0]), n)
            return tuple(float(round(schedule.timestep_at(sigma))) for sigma in levels), levels
        if self.name == "lcm":
            # n of the 50 timesteps of its training, from the last one on
            gap = schedule.config.num_train_timesteps // LCM_GRID
            timesteps = tuple(float((LCM_GRID - i * LCM_GRID // n) * gap - 1) for i in range(n))
            return timesteps, tuple(schedule.sigma_at(t) for t in timesteps)
        spacing = self.spacing or schedule.config.timestep_spacing
        points = n + 1 if self.name == "dpmpp_2m" and spacing != "trailing" else n
        timesteps = schedule.timesteps(points, spacing, whole=not SAMPLERS[self.name].continuous)[:n]
        levels = tuple(schedule.sigma_at(t) for t in timesteps)
        if self.karras:
            levels = karras_sigmas(levels[0], levels[-1], n)
            timesteps = tuple(schedule.timestep_at(sigma) for sigma in levels)
        return timesteps, levels


def karras_sigmas(largest: float, smallest: float, n: int, rho: float = 7.0) -> tuple[float, ...]:
    """n noise levels, from the largest to the smallest, even in σ^(1/ρ) (Karras et al. 2022, equation 5)."""
    # σ_i = (σ_max^(1/ρ) + i/(n−1) (σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ
    high, low = largest ** (1 / rho), smallest ** (1 / rho)
    return tuple((high + i / max(n - 1, 1) * (low - high)) ** rho for i in range(n))
