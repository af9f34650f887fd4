"""The parity tests can fail: each well-known mistake, made alone in ours, moves it far outside their tolerance.

The comparisons are the very functions that the parity tests call, on the same small networks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import SMALL_AUTOENCODER, SMALL_TEXT, SMALL_TEXT_2, SMALL_UNET, SMALL_UNET_2, TOLERANCE, difference, noise
from pairs import (
    Pair,
    autoencoders,
    decode_difference,
    encode_difference,
    norm_epsilons,
    text_difference,
    text_encoders,
    unet_difference,
    unets,
)
from torch import Tensor, nn

import minisd.attention
import minisd.text_encoder
import minisd.unet
from minisd.attention import GEGLU, Attention
from minisd.blocks import Downsample, ResBlock
from minisd.config import ModelConfig
from minisd.pipeline.stable_diffusion import StableDiffusion

CLEAR = 10 * TOLERANCE

Case = tuple[Callable[[], Pair], Callable[[Pair], float]]
TEXT: Case = partial(text_encoders, SMALL_TEXT), text_difference
TEXT_2: Case = partial(text_encoders, SMALL_TEXT_2), text_difference
ENCODE: Case = partial(autoencoders, SMALL_AUTOENCODER), encode_difference
DECODE: Case = partial(autoencoders, SMALL_AUTOENCODER), decode_difference
UNET: Case = partial(unets, SMALL_UNET), unet_difference
UNET_2: Case = partial(unets, SMALL_UNET_2), unet_difference


@pytest.mark.parametrize("case", [TEXT, TEXT_2, ENCODE, DECODE, UNET, UNET_2])
def test_without_a_mistake(case):
    build, compare = case
    assert compare(build()) <= TOLERANCE


# Every norm there is, one at a time: the pattern finds it, the right epsilon becomes the wrong one.
NORMS: list[tuple[str, Case, str, float, float]] = [
    ("CLIP layers", TEXT, r"layers\.\d\.layer_norm[12]", 1e-5, 1e-6),
    ("CLIP final", TEXT, r"final_layer_norm", 1e-5, 1e-6),
    ("encoder ResBlocks", ENCODE, r"encoder\..*resnets\.\d\.norm[12]", 1e-6, 1e-5),
    ("encoder attention", ENCODE, r"encoder\..*group_norm", 1e-6, 1e-5),
    ("encoder out", ENCODE, r"encoder\.conv_norm_out", 1e-6, 1e-5),
    ("decoder ResBlocks", DECODE, r"decoder\..*resnets\.\d\.norm[12]", 1e-6, 1e-5),
    ("decoder attention", DECODE, r"decoder\..*group_norm", 1e-6, 1e-5),
    ("decoder out", DECODE, r"decoder\.conv_norm_out", 1e-6, 1e-5),
    ("UNet ResBlocks", UNET, r".*resnets\.\d\.norm[12]", 1e-5, 1e-6),
    ("UNet transformer GroupNorm", UNET, r".*attentions\.\d\.norm", 1e-6, 1e-5),
    ("UNet transformer LayerNorms", UNET, r".*transformer_blocks\.0\.norm[123]", 1e-5, 1e-6),
    ("UNet out", UNET, r"conv_norm_out", 1e-5, 1e-6),
]


@pytest.mark.parametrize(("case", "pattern", "right", "wrong"), [row[1:] for row in NORMS], ids=[r[0] for r in NORMS])
def test_epsilon_of_every_norm(case, pattern, right, wrong):
    build, compare = case
    pair = build()
    norms = {n: m for n, m in pair.ours.named_modules() if re.fullmatch(f"(text_model.)?(encoder.)?{pattern}", n)}
    assert norms
    for name, norm in norms.items():
        assert norm.eps == right, name
        norm.eps = wrong
        assert compare(pair) > CLEAR, name
        norm.eps = right


def test_no_norm_was_left_out():
    covered = 0
    for build, networks in ((TEXT[0], "CLIP"), (ENCODE[0], "encoder|decoder"), (UNET[0], "UNet")):
        names = norm_epsilons(build().ours)
        patterns = [row[2] for row in NORMS if re.match(networks, row[0])]
        for name in names:
            assert any(re.fullmatch(f"(encoder.)?{p}", name) for p in patterns), name
        covered += len(names)
    assert covered > 80


def each(network: nn.Module, kind: type[nn.Module]) -> list[Any]:
    found = [module for module in network.modules() if isinstance(module, kind)]
    assert found
    return found


def tanh_in_geglu(network: Any, patch: pytest.MonkeyPatch) -> None:
    def forward(self: GEGLU, x: Tensor) -> Tensor:
        a, gate = self.proj(x).chunk(2, dim=-1)
        return a * F.gelu(gate, approximate="tanh")

    patch.setattr(GEGLU, "forward", forward)


def tanh_in_text(network: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in network.layers:
        layer.mlp.activation = partial(F.gelu, approximate="tanh")


def gelu_for_quick_gelu(network: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in network.layers:
        layer.mlp.activation = F.gelu


def quick_gelu_for_gelu(network: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in network.layers:
        layer.mlp.activation = minisd.text_encoder.quick_gelu


def symmetric_padding(network: Any, patch: pytest.MonkeyPatch) -> None:
    for downsample in each(network, Downsample):
        downsample.conv.padding = (1, 1)


def one_sided_padding(network: Any, patch: pytest.MonkeyPatch) -> None:
    for downsample in each(network, Downsample):
        downsample.conv.padding = (0, 0)


def padding_on_the_other_side(network: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Downsample, "forward", lambda self, x: self.conv(F.pad(x, (1, 0, 1, 0))))


def sine_first(network: Any, patch: pytest.MonkeyPatch) -> None:
    right = minisd.unet.timestep_embedding
    patch.setattr(minisd.unet, "timestep_embedding", lambda t, dim: right(t, dim).roll(dim // 2, dims=-1))


def twice_the_heads(network: Any, patch: pytest.MonkeyPatch) -> None:
    for attention in each(network, Attention):
        attention.heads *= 2


def head_width_for_head_count(network: Any, patch: pytest.MonkeyPatch) -> None:
    for attention in each(network, Attention):
        attention.heads = attention.to_q.out_features // attention.heads


def twice_the_heads_in_text(network: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in network.layers:
        layer.self_attn.heads *= 2


def no_causal_mask(network: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(minisd.text_encoder, "attend", lambda *inputs, causal: minisd.attention.attend(*inputs))


def no_final_norm(network: Any, patch: pytest.MonkeyPatch) -> None:
    network.text_model["final_layer_norm"] = nn.Identity()


def no_quant_conv(network: Any, patch: pytest.MonkeyPatch) -> None:
    network.quant_conv = nn.Identity()


def no_post_quant_conv(network: Any, patch: pytest.MonkeyPatch) -> None:
    network.post_quant_conv = nn.Identity()


MISTAKES: list[tuple[Case, Callable[[Any, pytest.MonkeyPatch], None]]] = [
    (TEXT, gelu_for_quick_gelu),
    (TEXT, twice_the_heads_in_text),
    (TEXT, no_causal_mask),
    (TEXT, no_final_norm),
    (TEXT_2, tanh_in_text),
    (TEXT_2, quick_gelu_for_gelu),
    (ENCODE, symmetric_padding),
    (ENCODE, padding_on_the_other_side),
    (ENCODE, no_quant_conv),
    (ENCODE, twice_the_heads),
    (DECODE, no_post_quant_conv),
    (DECODE, twice_the_heads),
    (UNET, tanh_in_geglu),
    (UNET, one_sided_padding),
    (UNET, sine_first),
    (UNET, twice_the_heads),
    (UNET, head_width_for_head_count),
    (UNET_2, tanh_in_geglu),
    (UNET_2, sine_first),
    (UNET_2, head_width_for_head_count),
]


@pytest.mark.parametrize(("case", "mistake"), MISTAKES, ids=[m.__name__ for _, m in MISTAKES])
def test_mistake(case, mistake, monkeypatch):
    build, compare = case
    pair = build()
    mistake(pair.ours, monkeypatch)
    assert compare(pair) > CLEAR


@pytest.mark.parametrize("case", [UNET, UNET_2], ids=["UNET", "UNET_2"])
def test_every_block_that_forgets_the_time(case):
    """With one channel per group the second norm would take the time away, and nothing would be found."""
    build, compare = case
    pair = build()
    blocks = each(pair.ours, ResBlock)
    assert len(blocks) == 17
    for number, block in enumerate(blocks):
        projection = block.time_emb_proj
        block.time_emb_proj = nn.Linear(projection.in_features, projection.out_features, dtype=torch.float64)
        nn.init.zeros_(block.time_emb_proj.weight)
        nn.init.zeros_(block.time_emb_proj.bias)
        assert compare(pair) > CLEAR, number
        block.time_emb_proj = projection
    assert compare(pair) <= TOLERANCE


def pipeline_around(autoencoder: Any) -> StableDiffusion:
    unet: Any = nn.ModuleDict({"conv_in": nn.Linear(1, 1, dtype=torch.float64)})  # tells device and dtype, no more
    nothing: Any = None
    config = replace(ModelConfig(), autoencoder=autoencoder.config)
    return StableDiffusion(config, nothing, nothing, unet, autoencoder)


def scaled_encode_difference(pair: Pair) -> float:
    images = noise(1, 3, 24, 40).clamp(-1, 1)
    expected = pair.theirs.encode(images).latent_dist.mean * 0.18215
    return difference(pipeline_around(pair.ours).encode_image(images), expected)


def scaled_decode_difference(pair: Pair) -> float:
    latents = noise(1, 4, 6, 10) * 0.2
    expected = pair.theirs.decode(latents / 0.18215).sample
    return difference(pipeline_around(pair.ours).decode_to_tensor(latents), expected)


@pytest.mark.parametrize("compare", [scaled_encode_difference, scaled_decode_difference])
@pytest.mark.parametrize("wrong", [1.0, 1 / 0.18215, 0.18216])
def test_scale_factor(compare, wrong):
    pair = autoencoders(SMALL_AUTOENCODER)
    assert compare(pair) <= TOLERANCE
    pair.ours.config = replace(pair.ours.config, scaling_factor=wrong)
    assert compare(pair) > CLEAR
