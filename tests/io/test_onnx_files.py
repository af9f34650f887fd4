"""`minisd export`: graphs of another runtime answer as the networks do, at sizes at which they were not made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from minisd import StableDiffusion
from minisd.app import export as command
from minisd.app.cli import main
from minisd.bench import peers
from minisd.bench.worker import Minisd, noise
from minisd.io import onnx_files
from tests.models import lively_model, write_adapters


def answer(path: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """What the graph says, computed by its own runtime."""
    if path.suffix == ".onnx":
        import onnxruntime

        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs)[0]
    import openvino

    return openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(inputs)[0]


@pytest.fixture(scope="module")
def exported() -> Iterator[None]:
    """Both formats are written from the same ONNX programs, which take most of the time: they are made once."""
    programs: dict[tuple[str, ...], Any] = {}
    make = torch.onnx.export

    def export(program: Any, **options: Any) -> Any:
        key = (*options["input_names"], *options["output_names"])
        if key not in programs:
            programs[key] = make(program, **options)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", export)
        yield


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("exported")
@pytest.mark.parametrize(("to", "file"), [("onnx", "model.onnx"), ("openvino", "model.xml")])
def test_the_graphs_answer_as_the_networks_at_another_size(to, file, small_model, tmp_path, capsys):
    assert main(["export", str(small_model), str(tmp_path / "out"), "--to", to]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    sd, rng = StableDiffusion.from_pretrained(small_model), torch.Generator().manual_seed(5)
    ids, t = sd.tokenizer(["a fox"]), torch.tensor([300.5])
    x, pixels = torch.randn(1, 4, 16, 32, generator=rng), torch.randn(1, 3, 64, 96, generator=rng)
    context = torch.randn(1, 77, sd.unet.config.cross_attention_dim, generator=rng)
    posterior = sd.autoencoder.encode(pixels)
    cases = {
        "text_encoder": ({"input_ids": ids}, sd.text_encoder(ids)),
        "unet": ({"sample": x, "timestep": t, "encoder_hidden_states": context}, sd.unet(x, t, context)),
        "vae_encoder": ({"sample": pixels}, torch.cat([posterior.mean, posterior.logvar], dim=1)),
        "vae_decoder": ({"latent_sample": x}, sd.autoencoder.decode(x)),
    }
    for part, (inputs, expected) in cases.items():
        given = answer(tmp_path / "out" / part / file, {name: value.numpy() for name, value in inputs.items()})
        apart = float((torch.from_numpy(given) - expected).abs().max() / expected.abs().max())
        assert apart < 1e-5, (part, apart)
        assert (tmp_path / "out" / part / "config.json").exists()
    assert not (tmp_path / "out/vae").exists() and (tmp_path / "out/tokenizer/merges.txt").exists()
    # minisd's sampler, with the networks computed by the runtime, draws minisd's picture
    peer = peers.Peer(next(name for name, kind in peers.PEERS.items() if kind == to))
    peer.graphs = tmp_path / "out"
    peer.load(str(small_model), "cpu", torch.float32, compiled=False)
    own = Minisd()
    own.load(str(small_model), "cpu", torch.float32, compiled=False)
    one, two = (np.asarray(each.picture(noise(64, "cpu"), 64, 2), dtype=int) for each in (peer, own))
    assert np.abs(one - two).max() <= 1
    with pytest.raises(ValueError, match="float16"):
        peer.load(str(small_model), "cpu", torch.float16, compiled=False)


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
