"""Checks that do not wait for a device: what they raise, and when. That no step waits is in `test_fake_gpu.py`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minisd import StableDiffusion
from minisd.features import validate
from minisd.features.asynchronous import guidance_on, queued
from minisd.features.validate import FiniteChecks
from minisd.generate import gaussian_noise
from minisd.guidance import Guidance

NAN = torch.tensor([0.0, float("nan")])


class LateFlag:
    """The flag of a device whose queue the test works through."""

    bad: frozenset[int] = frozenset()
    made = arrived = waits = 0

    def __init__(self, value: Tensor) -> None:
        self.number = LateFlag.made
        LateFlag.made += 1

    def has_arrived(self) -> bool:
        return self.number < LateFlag.arrived

    def read(self) -> bool:
        LateFlag.waits += not self.has_arrived()
        return self.number not in LateFlag.bad


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> type[LateFlag]:
    monkeypatch.setattr(validate, "Flag", LateFlag)
    for name, value in {"bad": frozenset({1}), "made": 0, "arrived": 0, "waits": 0}.items():
        monkeypatch.setattr(LateFlag, name, value)
    return LateFlag


def test_on_a_cpu_the_first_bad_value_raises():
    checks = FiniteChecks()
    checks.check(torch.zeros(3), "fine")
    for value in (NAN, torch.tensor(float("inf"))):
        with pytest.raises(FloatingPointError, match="spoilt"):
            checks.check(value, "spoilt")


def test_on_a_device_a_bad_value_raises_once_its_result_has_arrived(device):
    checks, value = FiniteChecks(), torch.empty(2, device="meta")
    for number in range(4):
        checks.check(value, f"value {number}")
    device.arrived = 3
    with pytest.raises(FloatingPointError, match="value 1"):
        checks.check(value, "value 4")
    assert device.waits == 0


def test_settling_waits_and_raises_for_the_first_bad_value(device):
    checks, value = FiniteChecks(), torch.empty(2, device="meta")
    device.bad = frozenset({1, 2})
    for number in range(4):
        checks.check(value, f"value {number}")
    assert device.waits == 0
    with pytest.raises(FloatingPointError, match="value 1"):
        checks.settle()
    assert device.waits == 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_flag(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for expected in (True, False):
        assert validate.Flag(torch.tensor(expected, device=device)).read() is expected


def test_no_bad_step_is_the_last(small_model, monkeypatch):
    """On a device that answers only when asked: of 4 steps with NaN in the third, no later one is yielded as the last.

    A CPU stands for the device, with checks that pretend that its tensors are elsewhere.
    """
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    checked, seen = FiniteChecks.check, list[int]()
    monkeypatch.setattr(validate.Flag, "has_arrived", lambda self: False)

    def check(self: FiniteChecks, value: Tensor, message: str) -> None:
        if value.device.type == "cpu":
            self._pending.append((validate.Flag(torch.isfinite(value).all()), message))
        else:
            checked(self, value, message)

    monkeypatch.setattr(FiniteChecks, "check", check)
    forward, calls = sd.unet.forward, list[int]()

    def spoilt(*inputs: Tensor) -> Tensor:
        calls.append(1)
        return forward(*inputs) + (float("nan") if len(calls) == 3 else 0)

    monkeypatch.setattr(sd.unet, "forward", spoilt)
    with pytest.raises(FloatingPointError, match="the UNet returned NaN or infinity in torch.float32"):
        for step in sd.denoise("fox", seed=0, num_inference_steps=4):
            seen.append(step.index)
    assert seen == [0, 1, 2] and len(calls) == 4


def test_queued_noise_is_that_of_the_seeds():
    source, expected = (gaussian_noise([1, 2], (4, 3, 3), "cpu") for _ in range(2))
    noise = queued(source, torch.device("cpu"))
    for _ in range(2):
        assert torch.equal(noise(), expected())


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_scales_on_the_device_guide_alike(rescale):
    uncond, cond = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    guidance = Guidance((3, 7.5), rescale)
    moved = guidance_on(guidance, torch.device("cpu"))
    assert isinstance(moved.scale, Tensor) and moved.scale.dtype == torch.float32
    assert torch.equal(moved.combine(uncond, cond), guidance.combine(uncond, cond))


def test_guidance_of_ones_own_keeps_its_scales():
    class Own(Guidance):
        pass

    guidance = Own((3.0, 4.0))
    assert guidance_on(guidance, torch.device("cpu")) is guidance
