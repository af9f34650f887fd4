"""The networks in other runtimes: `torch.export` and ONNX take them as they are, at any batch and size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export import Dim

import minisd
from minisd import SD21, TINY, Autoencoder, TextEncoder, UNet

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5  # of the largest number compared

SMALL_UNET = {"block_out_channels": (16, 24, 32), "norm_num_groups": 8, "cross_attention_dim": 32}
SMALL_UNET |= {"layers_per_block": 1, "attention_head_dim": (2, 3, 4)}
SMALL_TEXT = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL_TEXT |= {"num_attention_heads": 4}
BATCH, HEIGHT, WIDTH = Dim("batch"), Dim("height", min=8), Dim("width", min=8)  # of latents


class Part(NamedTuple):
    """A network, the dimensions of its inputs that vary, and inputs at several sizes."""

    network: nn.Module
    dynamic: tuple[dict[int, Any], ...]
    inputs: list[tuple[Tensor, ...]]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def unet(network: UNet) -> Part:
    channels, width = network.config.in_channels, network.config.cross_attention_dim
    inputs = [
        (noise(n, channels, h, w), torch.linspace(3, 990, n), noise(n, tokens, width))
        for n, h, w, tokens in ((2, 8, 12, 77), (1, 16, 16, 77), (3, 11, 9, 154), (4, 24, 8, 77))
    ]
    return Part(network, ({0: BATCH, 2: HEIGHT, 3: WIDTH}, {0: BATCH}, {0: BATCH, 1: Dim("tokens")}), inputs)


def encoder(network: Autoencoder) -> Part:
    inputs = [(noise(n, 3, h, w),) for n, h, w in ((2, 64, 96), (1, 128, 128), (3, 88, 72))]
    return Part(network.encoder, ({0: BATCH, 2: 8 * HEIGHT, 3: 8 * WIDTH},), inputs)


def decoder(network: Autoencoder) -> Part:
    inputs = [(noise(n, 4, h, w),) for n, h, w in ((2, 8, 12), (1, 16, 16), (3, 11, 9))]
    return Part(network.decoder, ({0: BATCH, 2: HEIGHT, 3: WIDTH},), inputs)


def text_encoder(network: TextEncoder) -> Part:
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 77), (1, 77), (5, 20))
    inputs = [(torch.randint(network.config.vocab_size, size, generator=generator),) for size in sizes]
    return Part(network, ({0: BATCH, 1: Dim("tokens", max=77)},), inputs)


def small(part: str) -> Part:
    """A small random network of Stable Diffusion 2, whose norms are not the identity."""
    torch.manual_seed(0)
    if part == "unet":
        blocks = {"down_block_types": SD21.unet.down_block_types[1:], "up_block_types": SD21.unet.up_block_types[:3]}
        network: Any = UNet(replace(SD21.unet, **SMALL_UNET, **blocks))
    else:
        network = TextEncoder(replace(SD21.text_encoder, **SMALL_TEXT))
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.3)
    return unet(network) if part == "unet" else text_encoder(network)


def shipped(part: str) -> Part:
    """A part of the tiny model."""
    if part == "unet":
        return unet(loaded(UNet(TINY.unet), "unet/diffusion_pytorch_model"))
    if part == "text encoder":
        return text_encoder(loaded(TextEncoder(TINY.text_encoder), "text_encoder/model"))
    autoencoder = loaded(Autoencoder(TINY.autoencoder), "vae/diffusion_pytorch_model")
    return encoder(autoencoder) if part == "encoder" else decoder(autoencoder)


def loaded(network: Any, name: str) -> Any:
    weights = load_file(Path(minisd.__file__).parent / f"assets/tiny/{name}.safetensors")
    network.load_state_dict({key: value.float() for key, value in weights.items()})
    return network


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["unet", "text encoder"])
def test_export_of_stable_diffusion_2(part, tmp_path):
    check_export(small(part), tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["unet", "encoder", "decoder", "text encoder"])
def test_export_of_the_tiny_model(part, tmp_path):
    check_export(shipped(part), tmp_path)


def check_export(part: Part, folder: Path) -> None:
    """Both forms of a part, made at the first of its sizes, answer as it does at all of them."""
    network = part.network.eval().requires_grad_(False)
    program = torch.export.export(network, part.inputs[0], dynamic_shapes=part.dynamic)
    path = folder / "part.onnx"
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    for inputs in part.inputs:
        expected = network(*inputs)
        (onnx,) = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        for answer in (program.module()(*inputs), torch.from_numpy(onnx)):
            apart = float((answer - expected).abs().max() / expected.abs().max())
            assert apart < TOLERANCE, f"{inputs[0].shape}: {apart:.1e}"
