"""The training loop: two processes make the step of one. Runs that are killed: `robustness/test_kills.py`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import call, together
from safetensors.torch import load_file
from small_training import small_task, train_small

from minisd.app.cli import main
from minisd.config import TINY
from minisd.io.atomic import save_atomically
from minisd.io.checkpoint import SHIPPED
from minisd.training.captions import colors_exchanged, mirrored
from minisd.training.clip import CLIPTask
from minisd.training.data import Scenes, render_scenes
from minisd.training.export import write_curves
from minisd.training.loop import Options, Shuffled, Trainer, learning_rate
from minisd.training.scenes import Mixture, flipped, render, scene, vocabulary
from minisd.training.unet import loss_weight

PARTS = ("autoencoder", "clip", "unet")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    render_scenes(folder, 48, seed=5)
    return folder


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "losses.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("part", PARTS)
def test_two_processes_make_the_step_of_one(part, scenes, tmp_path):
    steps = 6
    for done in (
        call(train_small, part, scenes, tmp_path / "one", steps),
        *together(2, train_small, part, scenes, tmp_path / "two", steps),
    ):
        assert done.code == 0, done.err[-2000:]
    one, two = np.array(losses(tmp_path / "one")), np.array(losses(tmp_path / "two"))
    print(part, "largest difference of the losses", np.abs(one - two).max())
    assert len(one) == len(two) == steps
    assert np.abs(one - two).max() <= 1e-4
    assert one.max() - one.min() > 1e-3, "the loss did not move, so agreeing means nothing"


@pytest.mark.parametrize("part", PARTS)
def test_mixed_precision_follows_the_steps_of_float32(part, scenes, tmp_path):
    found, losses, batch = {}, {}, 8 if part == "clip" else 4
    for bfloat16 in (False, True):
        task = small_task(part, scenes, tmp_path)
        options = Options(folder=tmp_path, steps=8, batch=batch, lr=1e-3, warmup=2, bfloat16=bfloat16)
        trainer = Trainer(task, options)
        losses[bfloat16] = [trainer.advance(step / 8)["loss"] for step in range(8)]
        found[bfloat16] = {p.dtype for p in task.model.parameters()} | {p.grad.dtype for p in trainer.parameters}  # type: ignore[union-attr]
    assert found[True] == {torch.float32}  # weights and gradients; what is multiplied is rounded
    assert losses[True] != losses[False]
    np.testing.assert_allclose(losses[True], losses[False], rtol=0.02)
    assert losses[False][-1] < losses[False][0]


def test_clip_goes_on_from_what_it_exported(scenes, tmp_path):
    """From the shipped weights and back, at once: every number is where it was, unknown tokens' zeros included."""
    task = CLIPTask(Scenes(scenes), vocabulary(), TINY.text_encoder, start=SHIPPED)
    task.export(task.model, tmp_path)
    for name in ("text_encoder/model.safetensors", "clip/model.safetensors"):
        mine, shipped = load_file(tmp_path / name), load_file(SHIPPED / name)
        assert mine.keys() == shipped.keys()
        for key, value in shipped.items():
            assert torch.equal(mine[key], value.float()), key


def test_resume_without_checkpoint_says_so(scenes, tmp_path):
    task = small_task("autoencoder", scenes, tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        Trainer(task, Options(folder=tmp_path / "none", steps=2, resume=True))


def test_rendered_scenes_are_the_stream(scenes):
    data = Scenes(scenes)
    assert len(data) == 48
    for index in (0, 17, 47):
        assert np.array_equal(data.pixels[index], render(scene(5, index)))
        assert data.captions[index] == scene(5, index).caption
    images = data.images([3, 4])
    assert images.shape == (2, 3, 192, 192)
    assert float(images.min()) >= -1 and float(images.max()) <= 1


def test_missing_scenes_name_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="minisd train scenes"):
        Scenes(tmp_path)


def test_mirrored_caption_is_the_mirrored_scenes():
    sided = [one for one in (scene(9, i) for i in range(200)) if one.relation in ("left", "right")]
    assert len(sided) > 5
    for one in sided:
        assert mirrored(one.caption) == flipped(one).caption != one.caption
        assert mirrored(mirrored(one.caption)) == one.caption


def test_colours_are_exchanged_between_objects_only():
    assert colors_exchanged("a red car next to an orange cat on a blue background") == (
        "an orange car next to a red cat on a blue background"
    )
    for caption in ("a red car on a blue background", "a red car above a fox in space", "two pink cats in a meadow"):
        assert colors_exchanged(caption) == caption
    scenes = [scene(9, i, mixture=Mixture(0, 1, 0)) for i in range(300)]
    pairs = [one for one in scenes if all(thing.color for thing in one.things)]
    assert len(pairs) > 10
    for one in pairs:
        lie = colors_exchanged(one.caption)
        assert (lie == one.caption) == (one.things[0].color == one.things[1].color)
        assert colors_exchanged(lie) == one.caption


def test_shuffled_is_a_permutation_in_every_epoch():
    order = Shuffled(10, seed=3)
    first, second = order(range(10)), order(range(10, 20))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert Shuffled(10, seed=3)([13, 2, 17]) == [second[3], first[2], second[7]]


def test_learning_rate_by_hand(tmp_path):
    options = Options(folder=tmp_path, steps=100, lr=1.0, warmup=10, decay_from=0.5)
    assert learning_rate(options, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(options, 4, 0.04) == pytest.approx(0.5)
    assert learning_rate(options, 30, 0.3) == pytest.approx(1.0)
    assert learning_rate(options, 75, 0.75) == pytest.approx(0.5)
    assert learning_rate(options, 100, 1.0) == pytest.approx(0.0)


def test_loss_weight_by_hand():
    # as an error of the clean latents, times SNR + 1, it is min(SNR + 1/4, 5)
    weights = loss_weight(torch.tensor([0.0, 1.0, 4.75, 100.0]))
    assert torch.allclose(weights, torch.tensor([0.25, 1.25 / 2, 5 / 5.75, 5 / 101]))


def test_options_want_a_length(tmp_path):
    with pytest.raises(ValueError, match="how long to train"):
        Options(folder=tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "weights"
    target.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_atomically(fail, target)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_curves_are_means_of_neighbouring_steps(tmp_path):
    log = tmp_path / "losses.jsonl"
    log.write_text("".join(json.dumps({"loss": step / 3, "lr": 0.5}) + "\n" for step in range(10)))
    write_curves(tmp_path / "curves.json", {"unet": log, "short": log}, points=5)
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert curves["unet"] == curves["short"]
    assert curves["unet"] == {"step": [2, 4, 6, 8, 10], "loss": [0.1667, 0.8333, 1.5, 2.167, 2.833], "lr": [0.5] * 5}


def test_a_checkpoint_is_not_lost_by_forgetting_to_resume(tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes(b"hours of work")
    assert main(["train", "judge", "--output", str(tmp_path), "--steps", "1", "--batch", "2"]) == 2
    said = capsys.readouterr().err
    assert "checkpoint.pt is that of an earlier training" in said and "--resume" in said
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"checkpoint.pt": b"hours of work"}
