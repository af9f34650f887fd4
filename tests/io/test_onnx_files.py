"""`minisd export`: torch's programs and other runtimes' graphs answer as the networks do, at any batch and size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from minisd import SD21, StableDiffusion, TextEncoder, UNet
from minisd.app import export as command
from minisd.app.cli import main
from minisd.bench import peers
from minisd.bench.worker import Minisd, noise
from minisd.io import onnx_files
from tests.models import SMALL, lively_model, write_adapters

TOLERANCE = 1e-5  # of the largest number compared

# Two levels have blocks of each kind; what it takes to export a network grows by the layer.
SD2_UNET = {"block_out_channels": (16, 24), "norm_num_groups": 8, "cross_attention_dim": 32}
SD2_UNET |= {"layers_per_block": 1, "attention_head_dim": (2, 3)}
SD2_UNET |= {"down_block_types": SD21.unet.down_block_types[2:], "up_block_types": SD21.unet.up_block_types[:2]}
SD2_TEXT = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SD2_TEXT |= {"num_attention_heads": 4}


def apart(answer: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((answer - expected).abs().max() / expected.abs().max())


def answers(path: Path, inputs: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """What the graph says of each, computed by its own runtime."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return [session.run(None, each)[0] for each in inputs]
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [np.array(compiled(each)[0]) for each in inputs]


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model like the tiny one, but for two levels in the UNet: the time of an export grows by the layer."""
    kinds = {"down_block_types": SMALL.unet.down_block_types[1:], "up_block_types": SMALL.unet.up_block_types[:2]}
    unet = replace(SMALL.unet, block_out_channels=(8, 16), **kinds)
    folder = tmp_path_factory.mktemp("shallow") / "model"
    sd = lively_model(replace(SMALL, unet=unet))
    for part in (sd.text_encoder, sd.unet, sd.autoencoder):
        for parameter in part.parameters():
            if parameter.ndim == 1:  # no norm is the identity
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    sd.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made_once() -> Iterator[None]:
    """torch's programs and their ONNX graphs take most of the time: they are made once for both formats."""
    programs: dict[Any, Any] = {}
    graphs: dict[int, Any] = {}
    trace, translate = torch.export.export, torch.onnx.export

    def export(network: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> Any:
        key = tuple(each.shape for each in (*inputs, *network.parameters()))
        if key not in programs:
            programs[key] = trace(network, inputs, **options)
        return programs[key]

    def to_onnx(program: Any, **options: Any) -> Any:
        if id(program) not in graphs:
            graphs[id(program)] = translate(program, **options)
        return graphs[id(program)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, "export", export)
        patch.setattr(torch.onnx, "export", to_onnx)
        yield


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("to", "file"), [("onnx", "model.onnx"), ("openvino", "model.xml")])
@pytest.mark.usefixtures("made_once")
def test_the_graphs_answer_as_the_networks_at_other_sizes(to, file, shallow, tmp_path, capsys):
    assert main(["export", str(shallow), str(tmp_path / "out"), "--to", to]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    sd, rng = StableDiffusion.from_pretrained(shallow), torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    def parameters(pixels: Tensor) -> Tensor:
        posterior = sd.autoencoder.encode(pixels)
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    width = sd.unet.config.cross_attention_dim
    calls = [
        (random(n, 4, h, w), torch.linspace(300.5, 990, n), random(n, tokens, width))
        for n, h, w, tokens in ((1, 16, 32, 77), (3, 11, 9, 154), (4, 24, 8, 77))
    ]
    cases: dict[str, Any] = {
        "text_encoder": (["input_ids"], sd.text_encoder, [(sd.tokenizer(["a fox"]),)]),
        "unet": (["sample", "timestep", "encoder_hidden_states"], sd.unet, calls),
        "vae_encoder": (["sample"], parameters, [(random(1, 3, 64, 96),), (random(3, 3, 88, 72),)]),
        "vae_decoder": (["latent_sample"], sd.autoencoder.decode, [(random(1, 4, 16, 32),), (random(3, 4, 11, 9),)]),
    }
    made = onnx_files.parts(sd.text_encoder, sd.unet, sd.autoencoder)
    for part, (names, network, inputs) in cases.items():
        graph = tmp_path / "out" / part / file
        given = answers(graph, [{name: x.numpy() for name, x in zip(names, each, strict=True)} for each in inputs])
        program = torch.export.export(made[part].network, made[part].examples[0], dynamic_shapes=made[part].varying)
        traced = program.module()
        for each, found in zip(inputs, given, strict=True):
            expected = network(*each)
            for one in (torch.from_numpy(found), traced(*each)):
                assert apart(one, expected) < TOLERANCE, (part, each[0].shape)
        assert (tmp_path / "out" / part / "config.json").exists()
    assert not (tmp_path / "out/vae").exists() and (tmp_path / "out/tokenizer/merges.txt").exists()
    # minisd's sampler, with the networks computed by the runtime, draws minisd's picture
    peer = peers.Peer(next(name for name, kind in peers.PEERS.items() if kind == to))
    peer.graphs = tmp_path / "out"
    peer.load(str(shallow), "cpu", torch.float32, compiled=False)
    own = Minisd()
    own.load(str(shallow), "cpu", torch.float32, compiled=False)
    one, two = (np.asarray(each.picture(noise(64, "cpu"), 64, 2), dtype=int) for each in (peer, own))
    assert np.abs(one - two).max() <= 1
    with pytest.raises(ValueError, match="float16"):
        peer.load(str(shallow), "cpu", torch.float16, compiled=False)


def stable_diffusion_2(part: str) -> tuple[nn.Module, tuple[dict[int, Any], ...], list[tuple[Tensor, ...]]]:
    """A small random network whose norms are not the identity, which sides of its inputs vary, and inputs."""
    torch.manual_seed(0)
    network: Any = UNet(replace(SD21.unet, **SD2_UNET))
    if part == "text encoder":
        network = TextEncoder(replace(SD21.text_encoder, **SD2_TEXT))
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.3)
    batch = {0: Dim("batch")}
    inputs: list[tuple[Tensor, ...]]
    if part == "text encoder":
        inputs = [(torch.randint(network.config.vocab_size, size),) for size in ((2, 77), (1, 77), (5, 20))]
        return network, (batch | {1: Dim("tokens", max=77)},), inputs
    sides = {2: Dim("height", min=8), 3: Dim("width", min=8)}
    inputs = [
        (torch.randn(n, 4, h, w), torch.linspace(3, 990, n), torch.randn(n, tokens, network.config.cross_attention_dim))
        for n, h, w, tokens in ((2, 8, 12, 77), (1, 16, 16, 77), (3, 11, 9, 154), (4, 24, 8, 77))
    ]
    return network, (batch | sides, batch, batch | {1: Dim("tokens")}), inputs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["unet", "text encoder"])
def test_networks_of_stable_diffusion_2(part, tmp_path):
    """Both forms of a part, made at the first of its sizes, answer as it does at all of them."""
    network, varying, examples = stable_diffusion_2(part)
    program = torch.export.export(network.eval().requires_grad_(False), examples[0], dynamic_shapes=varying)
    path, traced = tmp_path / "part.onnx", program.module()
    graph: Any = torch.onnx.export(program, dynamo=True, verbose=False)
    graph.save(path)
    names = [node.name for node in graph.model.graph.inputs]
    given = answers(path, [{name: x.numpy() for name, x in zip(names, each, strict=True)} for each in examples])
    for inputs, found in zip(examples, given, strict=True):
        for answer in (traced(*inputs), torch.from_numpy(found)):
            assert apart(answer, network(*inputs)) < TOLERANCE, inputs[0].shape


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_graph_that_differs_leaves_no_folder(small_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_files, "TOLERANCE", 1e-12)
    assert main(["export", str(small_model), str(tmp_path / "out")]) == 2
    assert "the onnx graph of text_encoder differs from the network by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    sd = lively_model()
    write_adapters(tmp_path)
    sd.load_lora(tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match="is not fused; call fuse_lora"):
        command.export_graphs(sd, tmp_path / "out")
    (tmp_path / "there").mkdir()
    assert main(["export", "tiny", str(tmp_path / "there")]) == 1
    assert "exists already; choose a new folder" in capsys.readouterr().err
    monkeypatch.setattr(onnx_files, "find_spec", lambda name: None)
    assert main(["export", "tiny", str(tmp_path / "out"), "--to", "openvino"]) == 1
    assert "pip install minisd[export]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
