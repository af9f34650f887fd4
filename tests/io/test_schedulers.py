"""Scheduler files as published and as saved by old versions of diffusers, against the schedulers it makes of them."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import pytest

from minisd import Sampler, Schedule
from minisd.io.schedulers import SCHEDULERS, read_scheduler, scheduler_values
from minisd.io.tensors import CheckpointError

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
OLD = {**BETAS, "trained_betas": None}
DPM = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True}
# The class in model_index.json and the content of scheduler_config.json, of published models and by old versions.
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "SD 1.5": (
        "PNDMScheduler",
        {**OLD, "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1},
    ),
    "SD 2.1 base": (
        "PNDMScheduler",
        {**OLD, "clip_sample": False, "prediction_type": "epsilon", "set_alpha_to_one": False, "skip_prk_steps": True}
        | {"steps_offset": 1},
    ),
    "SD 2.1": (
        "DDIMScheduler",
        {**OLD, "clip_sample": False, "prediction_type": "v_prediction", "set_alpha_to_one": False}
        | {"skip_prk_steps": True, "steps_offset": 1},
    ),
    "SD Turbo": (
        "EulerDiscreteScheduler",
        {**OLD, "clip_sample": False, "interpolation_type": "linear", "prediction_type": "epsilon"}
        | {"sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
        | {"timestep_spacing": "trailing", "use_karras_sigmas": False},
    ),
    "LCM": (
        "LCMScheduler",
        {**OLD, "clip_sample": False, "original_inference_steps": 50, "prediction_type": "epsilon"}
        | {"set_alpha_to_one": True, "steps_offset": 0, "timestep_spacing": "leading", "timestep_scaling": 10.0},
    ),
    "Euler a, few keys": ("EulerAncestralDiscreteScheduler", OLD),
    "Euler, few keys": ("EulerDiscreteScheduler", OLD),
    "Heun, few keys": ("HeunDiscreteScheduler", OLD),
    "DDIM, few keys": ("DDIMScheduler", BETAS),
    "DPM++ 2M, saved from PNDM": (
        "DPMSolverMultistepScheduler",
        {**OLD, **DPM, "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
        | {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0},
    ),
    "DPM++ 2M, type of another solver": (
        "DPMSolverMultistepScheduler", {**OLD, "solver_type": "logrho", "use_karras_sigmas": False},
    ),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {**OLD, **DPM, "use_karras_sigmas": True}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {**OLD, **DPM, "algorithm_type": "sde-dpmsolver++"}),
    "DPM++ SDE Karras": ("DPMSolverSDEScheduler", {**OLD, "use_karras_sigmas": True, "steps_offset": 1}),
    "DEIS": ("DEISMultistepScheduler", {**OLD, "algorithm_type": "deis", "solver_type": "logrho", "steps_offset": 1}),
    "DEIS Karras": ("DEISMultistepScheduler", {**OLD, "use_karras_sigmas": True}),
    "UniPC": ("UniPCMultistepScheduler", {**OLD, "solver_type": "bh2", "predict_x0": True, "disable_corrector": []}),
    "UniPC, exponential": ("UniPCMultistepScheduler", {**OLD, "use_exponential_sigmas": True}),
    "zero terminal SNR": (
        "EulerDiscreteScheduler",
        {**BETAS, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "zero terminal SNR, DDIM": (
        "DDIMScheduler",
        {**BETAS, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        | {"steps_offset": 1, "clip_sample": False},
    ),
    "no betas, DDIM": ("DDIMScheduler", {"num_train_timesteps": 1000, "steps_offset": 1}),
    "no betas, Heun": ("HeunDiscreteScheduler", {"prediction_type": "v_prediction"}),
    "no betas, LCM": ("LCMScheduler", {"num_train_timesteps": 1000}),
    "DDIMParallel": ("DDIMParallelScheduler", {**OLD, "set_alpha_to_one": False, "steps_offset": 1}),
}  # fmt: skip


def diffusers_class(name: str) -> Any:
    if name != "DPMSolverSDEScheduler":
        return getattr(diffusers, name)
    sys.modules.setdefault("torchsde", ModuleType("torchsde"))  # imported for its noise only
    return importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler


def write(folder: Path, kind: str, values: dict[str, Any]) -> Path:
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": kind, "_diffusers_version": "0.6.0", **values}))
    return path


def levels(scheduler: Any) -> tuple[list[float], list[float]]:
    """The timesteps of 20 steps, and the noise level of each call and after the last one."""
    scheduler.set_timesteps(20)
    timesteps = [float(t) for t in scheduler.timesteps]
    if hasattr(scheduler, "sigmas"):
        sigmas = scheduler.sigmas.double().numpy()
        if isinstance(scheduler, diffusers_class("DPMSolverSDEScheduler")):
            sigmas = np.array([*sigmas[::2], 0])  # without the midpoints
        return timesteps, sigmas.tolist()
    shares = scheduler.alphas_cumprod.double()[[int(t) for t in timesteps]].tolist()
    ends = 1.0 if isinstance(scheduler, diffusers.LCMScheduler) else getattr(scheduler, "final_alpha_cumprod", 1.0)
    # at zero terminal SNR, minisd has 2⁻²⁴ for 0, as most classes of diffusers
    return timesteps, [
        ((1 - share) / share) ** 0.5 for share in (*(max(share, 2**-24) for share in shares), float(ends))
    ]


def assert_same_levels(sampler: Sampler, schedule: Schedule, theirs: Any) -> None:
    plan, (timesteps, sigmas) = sampler.plan(schedule, 20), levels(theirs)
    assert plan.timesteps == pytest.approx(timesteps, abs=1e-2)
    ours = (*plan.sigmas[::2], 0.0) if sampler.name == "dpmpp_sde" else plan.sigmas
    assert ours == pytest.approx(sigmas, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("error::UserWarning")
def test_sampler_of_a_file(tmp_path, name):
    """The folder's own sampler, with diffusers' defaults; its pipelines set `steps_offset` to 1 in any case."""
    kind, values = FILES[name]
    config, sampler = read_scheduler(write(tmp_path, kind, values), kind)
    theirs = diffusers_class(kind).from_pretrained(tmp_path)
    theirs.register_to_config(steps_offset=1)
    assert (SCHEDULERS[sampler.name][0], config.prediction_type) == (
        kind.replace("Parallel", ""), theirs.config.prediction_type,
    )  # fmt: skip
    assert_same_levels(sampler, Schedule(config), theirs)


@pytest.mark.parametrize("other", [name for name in SCHEDULERS if name not in ("lcm", "dpmpp_2m_sde")])
@pytest.mark.parametrize(
    "name", [name for name in FILES if not any(word in name for word in ("Karras", "exponential", "no betas"))]
)
def test_another_sampler_with_a_file(tmp_path, name, other):
    """`from_config`: what the file names carries over to another class, what was only filled in does not."""
    kind, values = FILES[name]
    if "rescale_betas_zero_snr" in values and other in ("pndm", "heun", "deis", "dpmpp_sde"):
        pytest.skip("diffusers' class cannot rescale betas; minisd keeps the schedule of the model")
    config, _ = read_scheduler(write(tmp_path, kind, values), kind)
    own = diffusers_class(kind).from_pretrained(tmp_path)
    try:
        theirs = diffusers_class(SCHEDULERS[other][0]).from_config(own.config, skip_prk_steps=True)
    except (ValueError, NotImplementedError) as error:
        pytest.skip(f"diffusers refuses the file for this class: {error}")
    theirs.register_to_config(steps_offset=1)  # minisd keeps the offset of the pipeline
    assert_same_levels(Sampler(other), Schedule(config), theirs)


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, ["solver_order=3", "dpmpp_2m has solver_order=2"]),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, ["algorithm_type='dpmsolver'", "dpmsolver++"]),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, ["final_sigmas_type='sigma_min'"]),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True, "solver_type": "heun"}, ["lu_lambdas", "solver_type"]),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear", "sigma_max": 9.0}, ["log_linear", "sigma_max"]),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, ["timestep_type='continuous'"]),
        ("PNDMScheduler", {}, ["skip_prk_steps=False"]),
        ("DDPMScheduler", {"variance_type": "learned_range"}, ["variance_type='learned_range'"]),
        ("LCMScheduler", {"original_inference_steps": 100}, ["original_inference_steps=100"]),
        ("UniPCMultistepScheduler", {"solver_type": "bh1", "predict_x0": False}, ["bh1", "predict_x0"]),
        ("DEISMultistepScheduler", {"solver_order": 3}, ["solver_order=3", "deis has solver_order=2"]),
        ("LMSDiscreteScheduler", {}, ["LMSDiscreteScheduler is not supported", "euler"]),
        ("KDPM2DiscreteScheduler", {}, ["KDPM2DiscreteScheduler is not supported", "heun"]),
        ("KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}, ["KDPM2A", "euler_a, without karras noise"]),
        ("IPNDMScheduler", {}, ["IPNDMScheduler is not supported", "pndm"]),
        ("CosineDPMSolverMultistepScheduler", {}, ["CosineDPMSolverMultistepScheduler is not supported", "ddim"]),
        ("DPMSolverSinglestepScheduler", {}, ["DPMSolverSinglestepScheduler", "dpmpp_2m"]),
        ("SASolverScheduler", {}, ["SASolverScheduler", "dpmpp_2m_sde"]),
        ("TCDScheduler", {}, ["TCDScheduler", "lcm"]),
        ("MyScheduler", {}, ["MyScheduler is not supported", "ddim"]),
    ],
)  # fmt: skip
def test_unsupported_options_are_named(tmp_path, kind, values, words):
    with pytest.warns(UserWarning) as caught:
        read_scheduler(write(tmp_path, kind, {**BETAS, **values}), kind)
    assert len(caught) == 1 and all(word in str(caught[0].message) for word in words)


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        ("EDMEulerScheduler", {}, "another kind of model"),
        ("FlowMatchEulerDiscreteScheduler", {}, "another kind of model"),
        ("DDIMScheduler", {"thresholding": True}, "unsupported thresholding=True"),
        ("DDIMScheduler", {"trained_betas": [0.1]}, "unsupported trained_betas"),
        ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule='squaredcos_cap_v2'"),
        ("DDIMScheduler", {"timestep_spacing": "odd"}, "timestep_spacing='odd'"),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "expected 'v_prediction'"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "karras and beta"),
    ],
)
def test_unsupported_schedules_are_refused(tmp_path, kind, values, words):
    with pytest.raises(CheckpointError, match=words):
        read_scheduler(write(tmp_path, kind, {**BETAS, **values}), kind)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_written_file_in_diffusers(tmp_path, name):
    config, _ = read_scheduler(write(tmp_path, *FILES["SD 2.1"]), "DDIMScheduler")
    for spacing in (None, "trailing"):
        for sampler in (Sampler(name), Sampler(name, karras=name in ("euler", "heun", "unipc", "deis", "dpmpp_sde"))):
            values = scheduler_values(replace(config, timestep_spacing=spacing), sampler)
            path = write(tmp_path, values["_class_name"], values)
            again, kept = read_scheduler(path, values["_class_name"])
            assert (kept, again.timestep_spacing) == (sampler, spacing)
            theirs = diffusers_class(SCHEDULERS[name][0]).from_pretrained(tmp_path)
            assert_same_levels(sampler, Schedule(again), theirs)
