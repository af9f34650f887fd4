"""The one list of settings: where each value comes from, and how it is read and written."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from minisd import Sampler
from minisd.features.presets import PRESETS
from minisd.io.diffusers_folder import Defaults
from minisd.pipeline.settings import SAMPLER_LABELS, SETTINGS, Settings

MODEL = Defaults(Sampler("dpmpp_2m", karras=True), num_inference_steps=20, guidance_scale=4.0)


def choose(**changes: Any) -> Settings:
    return Settings.choose(changes, MODEL)


def test_settings_come_from_the_model_then_the_preset_then_the_caller():
    own = choose()
    assert (own.num_inference_steps, own.guidance_scale, own.sampler_object) == (20, 4.0, MODEL.sampler)
    fast = choose(preset="fast", guidance_scale=None)
    assert fast.num_inference_steps == PRESETS["fast"].settings["num_inference_steps"] != 20
    assert fast.sampler_object == Sampler("dpmpp_2m", spacing="trailing") and fast.guidance_scale == 4.0
    mine = choose(preset="fast", num_inference_steps=7, guidance_scale=[1, 2], karras=False, clip_skip=2)
    assert (mine.num_inference_steps, mine.guidance_scale, mine.clip_skip) == (7, (1, 2), 2)
    assert mine.feature_reuse == fast.feature_reuse


@pytest.mark.parametrize("preset", [None, "fast"])
def test_named_sampler_drops_spacing_and_noise_levels_of_the_layers_below(preset):
    assert choose(preset=preset, sampler="ddim").sampler_object == Sampler("ddim")
    assert choose(preset=preset, sampler="euler", karras=True).sampler_object == Sampler("euler", karras=True)
    assert choose(preset=preset, sampler=Sampler("heun", "linspace")).sampler_object == Sampler("heun", "linspace")
    ddim = Sampler("ddim", "trailing", eta=0.5)
    assert choose(preset=preset, sampler=ddim).sampler_object == ddim
    assert choose(preset=preset, sampler=ddim, spacing="leading").sampler_object == Sampler("ddim", "leading", eta=0.5)


def test_settings_of_another_picture_as_defaults():
    other = choose(sampler="euler", karras=True, clip_skip=2, guidance_interval=(0.2, 0.8))
    assert Settings.choose({}, other) == other
    changed = Settings.choose({"preset": "fast", "guidance_interval": [0, 1]}, other)
    assert changed.sampler_object == Sampler("dpmpp_2m", spacing="trailing")
    assert (changed.clip_skip, changed.guidance_interval) == (2, (0, 1))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"steps": 3}, TypeError, "'steps' is not a setting; expected one of num_inference_steps"),
        ({"preset": "quick"}, ValueError, "unknown preset 'quick'"),
        ({"sampler": 3}, TypeError, "sampler must be a name, a Sampler or a function, got int"),
        ({"sampler": "magic"}, ValueError, "'magic'"),
        ({"sampler": "ddim", "karras": True}, ValueError, "'ddim' does not support karras"),
        ({"spacing": "odd"}, ValueError, "spacing='odd'"),
        ({"sampler": "euler", "karras": 1}, TypeError, "karras=1; expected True or False"),
    ],
)
def test_settings_reject(changes, kind, message):
    with pytest.raises(kind, match=message):
        choose(**changes)


def test_only_changed_settings_are_listed():
    assert choose(clip_skip=2).changed() == {
        "num_inference_steps": 20, "sampler": "dpmpp_2m", "guidance_scale": 4.0, "karras": True, "clip_skip": 2,
    }  # fmt: skip


def test_every_setting_is_described_and_every_sampler_has_a_label():
    assert list(SETTINGS) == [item.name for item in fields(Settings)] and list(SAMPLER_LABELS) == list(
        Sampler.functions
    )
    assert all(setting.help for setting in SETTINGS.values())
    for key in ("option", "png", "label"):
        names = [name for setting in SETTINGS.values() if (name := getattr(setting, key))]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("num_inference_steps", 1000, "1000"),
        ("guidance_scale", 7.0, "7"),
        ("guidance_scale", 0.1 + 0.2, "0.30000000000000004"),
        ("guidance_interval", (0.25, 1.0), "0.25 1"),
        ("feature_reuse", (2, 3), "2 3"),
        ("spacing", "trailing", "trailing"),
    ],
)
def test_texts_of_a_picture_are_read_as_they_were_written(name, value, text):
    assert SETTINGS[name].to_text(value) == text and SETTINGS[name].from_text(text) == value


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_inference_steps", 2.0, "is 2.0; expected an integer"),
        ("num_inference_steps", True, "is true; expected an integer"),
        ("guidance_scale", "7", 'is "7"; expected a number'),
        ("karras", 1, "is 1; expected true or false"),
        ("sampler", None, "is null; expected a string"),
        ("feature_reuse", [2], r"is \[2\]; expected a list of two numbers"),
        ("feature_reuse", [2, True], ".*expected a list of two numbers"),
    ],
)
def test_json_of_the_wrong_type_is_rejected(name, value, expected):
    with pytest.raises(ValueError, match=f"{name} {expected}"):
        SETTINGS[name].from_json(name, value)


def test_json_of_the_right_type_is_read():
    values = {"num_inference_steps": 3, "guidance_scale": 2, "karras": True, "feature_reuse": [2, 1]}
    read = {name: SETTINGS[name].from_json(name, value) for name, value in values.items()}
    assert read == values | {"feature_reuse": (2, 1)}
