"""The text encoder against transformers' `CLIPTextModel` with the same weights."""

from __future__ import annotations

import math
import time

import pytest
import torch
from models import SD1_TEXT, SD2_TEXT, SMALL_TEXT, SMALL_TEXT_2, TOLERANCE, difference
from pairs import (
    FULL_SIZE_TOLERANCE,
    meta_text_encoders,
    norm_epsilons,
    parameters,
    shapes,
    text_difference,
    text_encoders,
)
from torch import Tensor

from minisd.config import SD15, SD21, SD21_BASE, TextEncoderConfig
from minisd.io.configs import check_config, read_config
from minisd.text_encoder import quick_gelu

IDS = torch.tensor([[49406, 320, 1125, 539, 320, 2368, 49407] + [49407] * 70])


def test_published_configurations():
    assert SD15.text_encoder == read_config(TextEncoderConfig, SD1_TEXT)
    assert SD21.text_encoder == SD21_BASE.text_encoder == read_config(TextEncoderConfig, SD2_TEXT)


@pytest.mark.parametrize(
    ("values", "count", "keys"), [(SD1_TEXT, 123_060_480, 196), (SD2_TEXT, 340_387_840, 372)], ids=["SD 1", "SD 2"]
)
def test_every_key_shape_and_epsilon(values, count, keys):
    ours, theirs = meta_text_encoders(values)
    assert parameters(ours) == count
    assert len(shapes(ours)) == keys
    assert shapes(ours) == {f"text_model.{key}": shape for key, shape in shapes(theirs).items()}
    assert norm_epsilons(ours) == norm_epsilons(theirs)


@pytest.mark.parametrize("values", [SMALL_TEXT, SMALL_TEXT_2], ids=["quick_gelu", "gelu"])
def test_small(values):
    assert text_difference(text_encoders(values)) <= TOLERANCE


@pytest.mark.parametrize("values", [SMALL_TEXT, SMALL_TEXT_2], ids=["quick_gelu", "gelu"])
def test_every_layer(values):
    ours, theirs = text_encoders(values)
    outputs: list[Tensor] = []
    for layer in ours.layers:
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    ours(IDS)
    expected = theirs(IDS, output_hidden_states=True).hidden_states[1:]
    assert len(outputs) == len(expected) == 3
    for output, reference in zip(outputs, expected, strict=True):
        assert difference(output, reference) <= TOLERANCE


@pytest.mark.parametrize("clip_skip", [1, 2, 3])
def test_clip_skip_leaves_out_the_last_layers_and_keeps_the_final_norm(clip_skip):
    ours, theirs = text_encoders(SMALL_TEXT)
    hidden = theirs(IDS, output_hidden_states=True).hidden_states[-clip_skip]
    assert difference(ours(IDS, clip_skip), theirs.final_layer_norm(hidden)) <= TOLERANCE


def test_fewer_tokens_than_positions():
    ours, theirs = text_encoders(SMALL_TEXT)
    assert difference(ours(IDS[:, :9]), theirs(IDS[:, :9]).last_hidden_state) <= TOLERANCE


def test_a_later_word_does_not_move_an_earlier_one():
    ours, _ = text_encoders(SMALL_TEXT)
    other = IDS.clone()
    other[0, 5] = 1929  # "dog"
    moved = (ours(IDS) - ours(other)).abs().amax(dim=-1)[0]
    assert torch.equal(moved[:5], torch.zeros(5, dtype=torch.float64))
    assert (moved[5:] > 0).all()


def test_quick_gelu_by_hand():
    for x in (-3.0, -0.5, 0.0, 0.7, 2.0):
        expected = x / (1 + math.exp(-1.702 * x))
        assert float(quick_gelu(torch.tensor(x, dtype=torch.float64))) == pytest.approx(expected, abs=1e-15)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_full_size():
    start = time.perf_counter()
    found = text_difference(text_encoders(SD1_TEXT, torch.float32))
    took = time.perf_counter() - start
    print(f"text encoder: {found:.2e} of the output's standard deviation, {took:.0f} s")
    assert found <= FULL_SIZE_TOLERANCE


def test_bad_configurations():
    with pytest.raises(ValueError, match="hidden_act='relu'; expected 'quick_gelu'"):
        check_config(TextEncoderConfig(hidden_act="relu"))
    with pytest.raises(ValueError, match="hidden_size=768 is not divisible by num_attention_heads=5"):
        check_config(TextEncoderConfig(num_attention_heads=5))
    with pytest.raises(ValueError, match="model_type='bert'; minisd supports only"):
        read_config(TextEncoderConfig, {"model_type": "bert"})
