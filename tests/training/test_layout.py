"""Where objects are, as the UNet's training asks for it: against rendered pixels, mirror images, computed by hand."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import torch

from minisd.config import TINY
from minisd.training import backgrounds
from minisd.training.layout_loss import Layout, WithLayout, layout_loss, layouts
from minisd.training.scenes import flipped, object_names, render, scene
from minisd.unet import UNet

PLAIN = [one for one in (scene(5, i) for i in range(120)) if not one.place][:24]


def test_cells_of_objects_are_those_that_were_painted():
    kind = layouts([asdict(one) for one in PLAIN]).kind.numpy() > 0
    for one, cells in zip(PLAIN, kind, strict=True):
        empty = backgrounds.background(one.background, one.time, one.seed)
        painted = np.abs(render(one).astype(float) - empty).max(-1) > 8
        centres = painted.reshape(24, 8, 24, 8)[:, 3:5, :, 3:5].mean((1, 3)) > 0.5
        assert centres.any() and (centres != cells).mean() < 0.03, one.caption


def test_the_object_is_named_and_its_parts_are_in_order():
    for one, kind, place in zip(PLAIN, *_arrays(layouts([asdict(one) for one in PLAIN])), strict=True):
        there = np.unique(kind[kind > 0]) - 1
        assert {object_names()[number] for number in there} == {thing.noun for thing in one.things}
        assert (np.abs(place) <= 1).all() and (place[:, kind == 0] == 0).all()
        if len(one.things) == 1:
            rows, columns = np.nonzero(kind)
            away = -1 if one.things[0].flip else 1
            assert np.corrcoef(columns, away * place[0][rows, columns])[0, 1] > 0.99
            assert np.corrcoef(rows, place[1][rows, columns])[0, 1] > 0.99


def test_the_mirror_image_has_the_mirrored_layout_and_the_same_parts():
    kind, place = _arrays(layouts([asdict(one) for one in PLAIN]))
    mirrored_kind, mirrored_place = _arrays(layouts([asdict(flipped(one)) for one in PLAIN]))
    assert (mirrored_kind[:, :, ::-1] == kind).mean() > 0.99
    same = mirrored_kind[:, :, ::-1] == kind
    assert np.abs(mirrored_place[..., ::-1] - place)[np.broadcast_to(same[:, None], place.shape)].max() < 0.02


def test_layout_loss_by_hand():
    answers = 1 + len(object_names()) + 2
    layout = Layout(torch.zeros(1, 24, 24, dtype=torch.int64), torch.zeros(1, 2, 24, 24))
    layout.kind[0, 0, 0], layout.place[0, 0, 0, 0] = 3, 0.5
    # answers of zero: any of the kinds is as likely, in every cell; in the one object cell the place is 0.5 off
    expected = math.log(answers - 2) + 0.5 / 576
    for side in (12, 24):
        assert math.isclose(float(layout_loss(torch.zeros(1, answers, side, side), layout)), expected, rel_tol=1e-6)


def test_the_extra_question_leaves_the_prediction_alone():
    torch.manual_seed(0)
    unet = UNet(TINY.unet)
    inputs = torch.randn(2, 4, 24, 24), torch.tensor([10.0, 900.0]), torch.randn(2, 77, 128)
    alone = unet(*inputs)
    prediction, answers = WithLayout(unet)(*inputs)
    assert torch.equal(prediction, alone)
    assert [tuple(answer.shape) for answer in answers] == [(2, 51, 12, 12), (2, 51, 24, 24)]


def _arrays(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    return layout.kind.numpy(), layout.place.float().numpy()
