"""A model's networks for other runtimes: one ONNX graph, or one OpenVINO graph, for each part."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from minisd.autoencoder import Autoencoder
from minisd.text_encoder import TextEncoder
from minisd.unet import UNet

FORMATS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
SIZES = ((2, 8, 16, 77), (3, 24, 8, 154))  # of examples: batch, height and width of latents, tokens
TOLERANCE = 1e-4  # of the largest number of an answer; beyond it, an export counts as failed


class Part(NamedTuple):
    """A network with named inputs and one named output, which input sizes may vary, and examples at two sizes."""

    network: nn.Module
    inputs: tuple[str, ...]
    output: str
    varying: tuple[dict[int, Any], ...]
    examples: tuple[tuple[Tensor, ...], ...]


class Call(nn.Module):
    """A method of a network as a network of its own, since a graph is made of its `forward`."""

    def __init__(self, network: nn.Module, method: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.method = network, method

    def forward(self, x: Tensor) -> Tensor:
        return self.method(x)


def parts(text_encoder: TextEncoder, unet: UNet, autoencoder: Autoencoder) -> dict[str, Part]:
    """The four graphs of a model, under the names of their folders and with the inputs' names of diffusers.

    `vae_encoder` answers with the means of the latents above their log variances, (n, 8, h/8, w/8), and `vae_decoder`
    takes unscaled latents.
    """
    batch, height, width = Dim("batch"), Dim("height", min=8), Dim("width", min=8)
    rng = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    def ids(n: int) -> Tensor:
        return torch.randint(text_encoder.config.vocab_size, (n, 77), generator=rng)

    def encode(images: Tensor) -> Tensor:
        return autoencoder.quant_conv(autoencoder.encoder(images))

    sample, channels = {0: batch, 2: height, 3: width}, autoencoder.config.latent_channels
    pixels = {0: batch, 2: 8 * height, 3: 8 * width}
    inputs, width_of_text = unet.config.in_channels, unet.config.cross_attention_dim
    return {
        "text_encoder": Part(text_encoder, ("input_ids",), "last_hidden_state", ({0: batch},), ((ids(2),), (ids(3),))),
        "unet": Part(
            unet,
            ("sample", "timestep", "encoder_hidden_states"),
            "out_sample",
            (sample, {0: batch}, {0: batch, 1: Dim("tokens", min=2)}),
            tuple(
                (noise(n, inputs, h, w), torch.linspace(900, 10, n), noise(n, tokens, width_of_text))
                for n, h, w, tokens in SIZES
            ),
        ),
        "vae_encoder": Part(
            Call(autoencoder, encode),
            ("sample",),
            "latent_parameters",
            (pixels,),
            tuple((noise(n, 3, 8 * h, 8 * w),) for n, h, w, _ in SIZES),
        ),
        "vae_decoder": Part(
            Call(autoencoder, autoencoder.decode),
            ("latent_sample",),
            "sample",
            (sample,),
            tuple((noise(n, channels, h, w),) for n, h, w, _ in SIZES),
        ),
    }


def check_installed(kind: str) -> None:
    """Raise ImportError, with the command that installs it, if a package that writes this format is missing."""
    missing = [name for name in FORMATS[kind] if find_spec(name) is None]
    if missing:
        raise ImportError(f"--to {kind} requires {' and '.join(missing)}; run: pip install minisd[export]")


def write_part(part: Part, folder: Path, kind: str) -> float:
    """Write one graph into `folder`, run it on examples of two sizes, and compare with the network itself.

    Returns:
        The largest difference, as a fraction of the largest number of the answer.

    Raises:
        ValueError: If the graph's answers differ from the network's by more than `TOLERANCE`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, network = folder / "model.onnx", part.network.eval().requires_grad_(False)
    with _quiet():
        program = torch.export.export(network, part.examples[0], dynamic_shapes=part.varying)
        names = {"input_names": part.inputs, "output_names": [part.output]}
        graph: Any = torch.onnx.export(program, dynamo=True, verbose=False, **names)  # type: ignore[arg-type]
        graph.save(path, external_data=True)
    run = _onnx_runner(path) if kind == "onnx" else _openvino_runner(path)
    apart = 0.0
    for inputs in part.examples:
        expected = network(*inputs)
        answer = torch.from_numpy(run(dict(zip(part.inputs, (each.numpy() for each in inputs), strict=True))))
        apart = max(apart, float((answer - expected).abs().max() / expected.abs().max()))
    if not apart < TOLERANCE:
        raise ValueError(
            f"the {kind} graph of {folder.name} differs from the network by {apart:.1e}; expected {TOLERANCE:g}"
        )
    return apart


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what torch's exporter says of itself: deprecated calls of its own, and a missing torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _onnx_runner(path: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)[0]


def _openvino_runner(path: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """Replace an ONNX graph by an OpenVINO one, float32 as it was."""
    import openvino

    openvino.save_model(openvino.convert_model(path), path.with_suffix(".xml"), compress_to_fp16=False)
    for each in path.parent.glob("model.onnx*"):
        each.unlink()
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path.with_suffix(".xml"), "CPU", hint)
    return lambda inputs: compiled(inputs)[0]
