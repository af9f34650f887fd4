"""The scheduler of a diffusers folder: reading and writing `scheduler_config.json`.

Published files name few keys, and those of old versions even fewer. diffusers fills in the rest from the defaults of
the scheduler's class, and so does `read_scheduler`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minisd.config import ScheduleConfig
from minisd.features.more_samplers import Sampler
from minisd.io.configs import read_config, read_json, to_dict
from minisd.io.tensors import CheckpointError, printable

Supported = Mapping[str, tuple[Any, ...]]

LEVELS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
OFF = (False, None)
SIGMAS: Supported = dict.fromkeys(LEVELS, (False, True, None))
LIMITS: Supported = {"sigma_min": (None,), "sigma_max": (None,)}
FLOW: Supported = {"use_flow_sigmas": OFF, "use_dynamic_shifting": OFF, "flow_shift": (1.0,)}
# Each solver treats the types of the other solvers as its own.
MULTISTEP: Supported = {"solver_order": (2,), "lower_order_final": (True,), **SIGMAS, **FLOW}
DPM: Supported = {
    **MULTISTEP, "lower_order_final": (True, False), "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
    "final_sigmas_type": ("zero",), "use_lu_lambdas": OFF, "lambda_min_clipped": (-math.inf,), "variance_type": (None,),
}  # fmt: skip
# The diffusers class of each sampler, with the values that minisd supports of those of its options that change the
# picture. The first value is written when saving.
SCHEDULERS: Mapping[str, tuple[str, Supported]] = {
    "ddpm": ("DDPMScheduler", {"clip_sample": (False, True), "variance_type": ("fixed_small", "fixed_small_log")}),
    "ddim": ("DDIMScheduler", {"clip_sample": (False, True)}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": (True,)}),
    "euler": (
        "EulerDiscreteScheduler",
        {
            "interpolation_type": ("linear",), "timestep_type": ("discrete",), "final_sigmas_type": ("zero",),
            **SIGMAS, **LIMITS,
        },
    ),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {**SIGMAS, "clip_sample": (False, True)}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": ("dpmsolver++",), **DPM}),
    "lcm": (
        "LCMScheduler",
        {"clip_sample": (False, True), "original_inference_steps": (50,), "timestep_scaling": (10.0,)},
    ),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": ("sde-dpmsolver++",), **DPM}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {**SIGMAS, "noise_sampler_seed": (None,)}),
    "unipc": (
        "UniPCMultistepScheduler",
        {
            "solver_type": ("bh2", "midpoint", "heun", "logrho"), "predict_x0": (True,), "disable_corrector": ([],),
            "solver_p": (None,), "final_sigmas_type": ("zero",), "shift_terminal": (None,), **MULTISTEP, **LIMITS,
        },
    ),
    "deis": (
        "DEISMultistepScheduler",
        {"algorithm_type": ("deis", "dpmsolver", "dpmsolver++"), **MULTISTEP}
        | {"solver_type": ("logrho", "midpoint", "heun", "bh1", "bh2")},
    ),
}  # fmt: skip
# Classes without a sampler, with the nearest one. The parallel classes differ in their interface only.
EQUAL = {"DDIMParallelScheduler": "ddim", "DDPMParallelScheduler": "ddpm"}
NEAREST = {
    "LMSDiscreteScheduler": "euler", "KDPM2DiscreteScheduler": "heun", "KDPM2AncestralDiscreteScheduler": "euler_a",
    "DPMSolverSinglestepScheduler": "dpmpp_2m", "SASolverScheduler": "dpmpp_2m_sde", "IPNDMScheduler": "pndm",
    "TCDScheduler": "lcm",
}  # fmt: skip
# Classes whose UNet has other inputs or outputs.
OTHER_MODELS = ("EDM", "FlowMatch", "FlowMap", "CMStochastic", "KarrasVe", "ScoreSde", "VQ", "UnCLIP")
# What a class fills in for missing keys, in general and in particular. Timestep spacing and the end of DDIM and PNDM
# depend on the sampler in use, so they are left open (see `ScheduleConfig`).
COMMON = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
FILLED: Mapping[str, Mapping[str, Any]] = {
    "PNDMScheduler": {"skip_prk_steps": False},
    **dict.fromkeys(("HeunDiscreteScheduler", "DPMSolverSDEScheduler"), SD_BETAS),
    **dict.fromkeys(("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"), SD_BETAS),
    **dict.fromkeys(("LCMScheduler", "TCDScheduler"), {**SD_BETAS, "beta_schedule": "scaled_linear"}),
}
# diffusers' pipelines override these, whatever the file says
PIPELINE = {"steps_offset": 1, "clip_sample": False}


def read_scheduler(path: Path, kind: str) -> tuple[ScheduleConfig, Sampler]:
    """Read the noise schedule and the sampler of a `scheduler_config.json`, as a diffusers pipeline would.

    It warns of a class that has no sampler here, and of options that the sampler does not support.

    Args:
        kind: The class in `model_index.json`, which takes precedence over the one in the file.

    Raises:
        CheckpointError: If the file is missing or corrupted, or describes an unsupported noise schedule.
    """
    values = {**COMMON, **FILLED.get(kind, {}), **read_json(path)}
    if kind.startswith(OTHER_MODELS):
        raise CheckpointError(f"{path} is a {printable(kind)}, for another kind of model; expected a DDIMScheduler")
    try:
        config = read_config(ScheduleConfig, values | PIPELINE)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} describes an unsupported model: {error}") from error
    if values.get("set_alpha_to_one") is None:
        config = replace(config, set_alpha_to_one=None)
    name = _sampler_name(path, kind, values)
    return config, Sampler(name, **_levels(path, name, values))


def _sampler_name(path: Path, kind: str, values: Mapping[str, Any]) -> str:
    """Return the name of a scheduler's sampler. Warns unless it does the same."""
    names = [name for name, (other, _) in SCHEDULERS.items() if other == kind]
    if not names:
        name = EQUAL.get(kind) or NEAREST.get(kind, "ddim")
        lost = [level for key, level in LEVELS.items() if values.get(key) is True and key not in SCHEDULERS[name][1]]
        more = f", without {' and '.join(lost)} noise levels" if lost else ""
        if kind not in EQUAL:
            notice = f"{printable(kind)} is not supported; the default sampler is {name}{more}"
            warnings.warn(f"{path}: {notice}", stacklevel=2)
        return name
    algorithm = values.get("algorithm_type")
    name = next((name for name in names if algorithm in SCHEDULERS[name][1].get("algorithm_type", ())), names[0])
    supported = SCHEDULERS[name][1]
    others = [key for key in supported if key in values and values[key] not in supported[key]]
    if others:
        given = ", ".join(f"{key}={printable(repr(values[key]))}" for key in others)
        used = ", ".join(f"{key}={supported[key][0]!r}" for key in others)
        warnings.warn(f"{path}: {given} of {kind} is not supported; {name} has {used}", stacklevel=2)
    return name


def _levels(path: Path, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the noise levels in a file as options of a sampler."""
    chosen = [LEVELS[key] for key in LEVELS if key in SCHEDULERS[name][1] and values.get(key) is True]
    if len(chosen) > 1:
        raise CheckpointError(f"{path} names several noise levels, {' and '.join(chosen)}; expected at most one")
    return {"karras": True} if chosen == ["karras"] else {"sigmas": chosen[0]} if chosen else {}


def scheduler_values(schedule: ScheduleConfig, sampler: Sampler) -> dict[str, Any]:
    """Return the content of a `scheduler_config.json`."""
    name, supported = SCHEDULERS[sampler.name]
    values = to_dict(schedule) | {"timestep_spacing": sampler.spacing or schedule.timestep_spacing}
    chosen = "karras" if sampler.karras else sampler.sigmas
    options = {key: kept[0] for key, kept in supported.items() if isinstance(kept[0], (str, bool, int))}
    options |= {key: chosen == level for key, level in LEVELS.items() if key in supported}
    return {"_class_name": name} | {key: value for key, value in values.items() if value is not None} | options
