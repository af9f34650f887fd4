"""The autoencoder's losses for sharp pictures, each against a closed form or a sum by hand."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from minisd.autoencoder import Autoencoder
from minisd.config import AutoencoderConfig
from minisd.training.adversarial import AdversarialTask, Adversary, interpolated
from minisd.training.data import Scenes, render_scenes
from minisd.training.discriminator import PatchDiscriminator, fine_detail
from minisd.training.features import FeaturesTask, SceneFeatures
from minisd.training.loop import Options, Trainer
from minisd.training.losses import adaptive_weight, discriminator_loss, generator_loss, perceptual_loss

SMALL = AutoencoderConfig(block_out_channels=(8, 8, 8, 8), norm_num_groups=2, layers_per_block=1)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    folder = tmp_path_factory.mktemp("scenes")
    render_scenes(folder, 8, seed=6)
    return Scenes(folder)


def test_perceptual_loss_depends_on_directions_only():
    right, up = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    a, b = right.view(1, 2, 1, 1).expand(1, 2, 4, 4), up.view(1, 2, 1, 1).expand(1, 2, 4, 4)
    # ‖u − v‖² of unit vectors is 2 − 2 cos: 2 where they are orthogonal, 4 where opposite
    assert float(perceptual_loss([3 * a], [7 * b])) == pytest.approx(2)
    assert float(perceptual_loss([3 * a], [-7 * a])) == pytest.approx(4)
    assert float(perceptual_loss([3 * a, a], [5 * a, b])) == pytest.approx(2)
    half = torch.cat([a[..., :2], b[..., :2]], dim=-1)
    assert float(perceptual_loss([half], [a])) == pytest.approx(1)


def test_hinge_losses_by_hand():
    # ½ (mean of 0, 0, 1.5 + mean of 0, 0.5, 3)
    real, fake = torch.tensor([2.0, 1.0, -0.5]), torch.tensor([-1.0, -0.5, 2.0])
    assert float(discriminator_loss(real, fake)) == pytest.approx((1.5 / 3 + 3.5 / 3) / 2)
    assert float(discriminator_loss(torch.zeros(4), torch.zeros(4))) == 1
    assert float(generator_loss(fake)) == pytest.approx(-0.5 / 3)


def test_adaptive_weight_makes_gradients_at_the_last_layer_equal():
    last = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    features = torch.tensor([[3.0], [4.0]])
    output = last @ features
    # d/dW of (W f) is f, of norm 5; of 10 (W f) it is 10 f
    assert float(adaptive_weight(output.sum(), (10 * output).sum(), last)) == pytest.approx(0.1)
    assert float(adaptive_weight((8 * output).sum(), output.sum(), last, ceiling=2.0)) == 2
    assert not adaptive_weight(output.sum(), output.sum(), last).requires_grad
    output.sum().backward()  # the graph is still there


def test_fine_detail_is_the_picture_minus_its_neighbourhood():
    dot = torch.zeros(1, 1, 5, 5)
    dot[0, 0, 2, 2] = 9
    expected = torch.zeros(5, 5)
    expected[1:4, 1:4] = -1
    expected[2, 2] = 8
    assert torch.equal(fine_detail(dot)[0, 0], expected)
    assert float(fine_detail(torch.full((1, 3, 6, 6), 0.7)).abs().max()) < 1e-6


def test_a_score_of_the_discriminator_depends_on_70_pixels():
    torch.manual_seed(0)
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    scores = PatchDiscriminator()(images)
    assert scores.shape == (1, 1, 14, 14)
    scores[0, 0, 7, 7].backward()
    assert images.grad is not None
    rows = images.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    # 70 of its five convolutions (Isola et al. 2017, appendix 6.1.2), and one on each side for the 3 × 3 means
    assert int(rows.max() - rows.min()) + 1 == 72


def test_share_of_the_adversary_by_hand():
    adversary = Adversary(share=0.5, alone=300, ramp=100)
    assert [adversary.at(step) for step in (0, 300, 350, 400, 9000)] == [0, 0, 0.25, 0.5, 0.5]


def small_adversarial(scenes: Scenes, alone: int, share: float = 0.25) -> AdversarialTask:
    torch.manual_seed(1)
    adversary = Adversary(share=share, alone=alone, ramp=1)
    return AdversarialTask(scenes, Autoencoder(SMALL), SceneFeatures(), adversary=adversary)


def test_decoder_and_discriminator_learn_from_their_own_losses(scenes, tmp_path):
    task = small_adversarial(scenes, alone=0)
    task.loss(step=1, positions=range(2), local=slice(0, 2), progress=0.0)[0].backward()
    of_discriminator = [p.grad.clone() for p in task.discriminator.parameters() if p.grad is not None]
    of_decoder = [p.grad.clone() for p in task.autoencoder.decoder.parameters() if p.grad is not None]
    task.model.zero_grad()

    images = scenes.images(task.order(range(2)))
    output = task.autoencoder.decode(task.autoencoder.encode(images).mean).detach()
    discriminator_loss(task.discriminator(images), task.discriminator(output)).backward()
    for parameter, gradient in zip(task.discriminator.parameters(), of_discriminator, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)

    alone = small_adversarial(scenes, alone=10)
    alone.loss(step=1, positions=range(2), local=slice(0, 2), progress=0.0)[0].backward()
    assert all(p.grad is None for p in alone.autoencoder.parameters()), "the decoder waits"
    for parameter, gradient in zip(alone.discriminator.parameters(), of_discriminator, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)

    faint = small_adversarial(scenes, alone=0, share=1e-9)
    faint.loss(step=1, positions=range(2), local=slice(0, 2), progress=0.0)[0].backward()
    without = [p.grad for p in faint.autoencoder.decoder.parameters() if p.grad is not None]
    assert any(not torch.allclose(a, b) for a, b in zip(of_decoder, without, strict=True)), "no adversarial gradient"


def test_adversarial_phase_leaves_latents_as_they_are(scenes, tmp_path):
    task = small_adversarial(scenes, alone=1)
    images = scenes.images([0, 1])
    latents = task.autoencoder.encode(images).mean.detach()
    before = task.autoencoder.decode(latents).detach()
    trainer = Trainer(task, Options(tmp_path, steps=6, batch=2, warmup=1))
    lines = [trainer.advance(0.0) for _ in range(6)]
    assert torch.equal(task.autoencoder.encode(images).mean, latents)
    assert not torch.allclose(task.autoencoder.decode(latents), before)
    assert lines[0]["weight"] == lines[1]["weight"] == 0 and lines[-1]["weight"] > 0


def test_exported_decoder_lies_between_the_first_and_the_last(scenes, tmp_path):
    task = small_adversarial(scenes, alone=1)
    first = {name: value.clone() for name, value in task.autoencoder.state_dict().items()}
    trainer = Trainer(task, Options(tmp_path, steps=3, batch=2, warmup=1))
    for _ in range(3):
        trainer.advance(0.0)
    task.export(task.model, tmp_path)
    exported, last = load_file(tmp_path / "vae/diffusion_pytorch_model.safetensors"), task.autoencoder.state_dict()
    name = "decoder.conv_out.weight"
    assert not torch.equal(first[name], last[name])
    torch.testing.assert_close(exported[name], 0.1 * first[name] + 0.9 * last[name])
    assert torch.equal(exported["encoder.conv_in.weight"], first["encoder.conv_in.weight"])
    whole = interpolated(task.first, task.autoencoder, 1.0).state_dict()
    assert all(torch.equal(value, last[name]) for name, value in whole.items())


def test_features_learn_what_is_in_a_cell(scenes, tmp_path):
    task = FeaturesTask(scenes)
    trainer = Trainer(task, Options(tmp_path, steps=16, batch=2, lr=3e-3, warmup=5))
    lines = [trainer.advance(0.0) for _ in range(16)]
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    task.export(task.model, tmp_path)
    loaded = SceneFeatures.load(tmp_path / "features.safetensors")
    images = scenes.images([0, 1])
    with torch.no_grad():
        mine, its = task.model(images), loaded(images)
    assert [x.shape[-1] for x in mine] == [192, 96, 48, 24]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(mine, its, strict=True))
