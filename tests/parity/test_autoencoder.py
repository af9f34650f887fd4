"""The autoencoder against diffusers' `AutoencoderKL` with the same weights; the Gaussian against closed forms."""

from __future__ import annotations

import time

import pytest
import torch
from models import SD1_AUTOENCODER, SMALL_AUTOENCODER, TOLERANCE, difference, noise
from pairs import (
    KERNEL_TOLERANCE,
    LAYOUT_TOLERANCE,
    autoencoders,
    decode_difference,
    encode_difference,
    meta_autoencoders,
    norm_epsilons,
    norms_in_float64,
    parameters,
    shapes,
)
from torch.distributions import Normal, kl_divergence

from minisd.autoencoder import Gaussian
from minisd.config import SD15, SD21, AutoencoderConfig
from minisd.io.configs import check_config, read_config


def test_published_configurations():
    assert SD15.autoencoder == read_config(AutoencoderConfig, SD1_AUTOENCODER)
    assert SD21.autoencoder == read_config(AutoencoderConfig, {**SD1_AUTOENCODER, "sample_size": 768})
    assert SD15.autoencoder.downscale == 8
    assert SD15.autoencoder.scaling_factor == 0.18215


def test_every_key_shape_and_epsilon():
    ours, theirs = meta_autoencoders(SD1_AUTOENCODER)
    assert parameters(ours.encoder) + parameters(ours.quant_conv) == 34_163_664
    assert parameters(ours.decoder) + parameters(ours.post_quant_conv) == 49_490_199
    assert parameters(ours) == 83_653_863
    assert len(shapes(ours)) == 248
    assert shapes(ours) == shapes(theirs)
    assert norm_epsilons(ours) == norm_epsilons(theirs)
    assert set(norm_epsilons(ours).values()) == {1e-6}


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 24), (8, 72)])
def test_encode_small(height, width):
    assert encode_difference(autoencoders(SMALL_AUTOENCODER), height, width) <= TOLERANCE


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 9), (1, 3)])
def test_decode_small(height, width):
    assert decode_difference(autoencoders(SMALL_AUTOENCODER), height, width) <= TOLERANCE


def test_forward_decodes_the_mean_or_a_sample():
    ours, theirs = autoencoders(SMALL_AUTOENCODER)
    images, draw = noise(2, 3, 16, 24).clamp(-1, 1), noise(2, 4, 4, 6, seed=7)
    posterior = theirs.encode(images).latent_dist
    assert difference(ours(images)[0], theirs.decode(posterior.mean).sample) <= TOLERANCE
    expected = theirs.decode(posterior.mean + posterior.std * draw).sample
    assert difference(ours(images, draw)[0], expected) <= TOLERANCE


def test_decoding_twice_gives_the_same_and_leaves_the_latents():
    ours, _ = autoencoders(SMALL_AUTOENCODER)
    latents = noise(1, 4, 5, 6)
    before = latents.clone()
    assert torch.equal(ours.decode(latents), ours.decode(latents))
    assert torch.equal(latents, before)


def test_log_variance_is_clamped():
    ours, theirs = autoencoders(SMALL_AUTOENCODER)
    ours.quant_conv.weight.mul_(40)  # one tensor, shared by both
    images = noise(2, 3, 32, 32)
    logvar, expected = ours.encode(images).logvar, theirs.encode(images).latent_dist.logvar
    assert logvar.amin() == expected.amin() == -30
    assert logvar.amax() == expected.amax() == 20
    assert difference(logvar, expected) <= TOLERANCE


def test_kl_against_torch():
    mean, logvar = noise(3, 4, 5, 6), noise(3, 4, 5, 6, seed=2)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(Gaussian(mean, logvar).kl(), expected, rtol=1e-12, atol=0)


def test_kl_by_hand():
    # μ = 2, σ² = 4: ½ (4 + 4 − 1 − ln 4) for each of two latents
    gaussian = Gaussian(torch.full((1, 2, 1, 1), 2.0), torch.full((1, 2, 1, 1), 1.3862943611))
    assert float(gaussian.kl()) == pytest.approx(7 - 1.3862943611, rel=1e-6)
    assert float(Gaussian(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)).kl()) == 0


def test_sample_by_hand():
    gaussian = Gaussian(torch.tensor([1.0, -2.0]), torch.tensor([0.0, 2.1972246]))  # σ = 1, 3
    torch.testing.assert_close(gaussian.sample(torch.tensor([0.5, -1.0])), torch.tensor([1.5, -5.0]))


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_full_size():
    start = time.perf_counter()
    pair = autoencoders(SD1_AUTOENCODER, torch.float32)
    with norms_in_float64():
        encoded, middle = encode_difference(pair, 192, 160, n=1), time.perf_counter()
        decoded, end = decode_difference(pair, 24, 20, n=1), time.perf_counter()
    print(f"VAE encode, 192×160: {encoded:.2e} of the output's standard deviation, {middle - start:.0f} s")
    print(f"VAE decode, 192×160: {decoded:.2e} of the output's standard deviation, {end - middle:.0f} s")
    assert encoded <= KERNEL_TOLERANCE
    assert decoded <= KERNEL_TOLERANCE
    assert decode_difference(pair, 24, 20, n=1) <= LAYOUT_TOLERANCE


def test_what_channels_last_costs():
    """Why there are two tolerances: torch's own GroupNorm, in both layouts, beside float64."""
    torch.manual_seed(0)
    x = torch.randn(1, 128, 256, 256) + 3
    expected = torch.nn.functional.group_norm(x.double(), 32)
    off = [
        float((torch.nn.functional.group_norm(x.to(memory_format=layout), 32) - expected).abs().max())
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    assert off[0] < 2e-6 and 10 * off[0] < off[1] < LAYOUT_TOLERANCE


def test_bad_configurations():
    with pytest.raises(ValueError, match="=100 is not divisible by norm_num_groups=32"):
        check_config(AutoencoderConfig(block_out_channels=(100,)))
    with pytest.raises(ValueError, match="use_quant_conv=False; minisd supports only use_quant_conv=True"):
        read_config(AutoencoderConfig, {**SD1_AUTOENCODER, "use_quant_conv": False})
