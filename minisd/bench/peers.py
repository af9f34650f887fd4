"""Other runtimes in the benchmark: minisd's UNet and decoder as graphs of OpenVINO or ONNX Runtime, on a CPU."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisd.bench.worker import Minisd
from minisd.features.distributed import child_environment

PEERS = {"openvino": "openvino", "onnxruntime": "onnx"}  # the names of the runtimes, and of their files for `export`
Run = Callable[[dict[str, np.ndarray]], np.ndarray]


@contextmanager
def exported(source: str | Path, libraries: Sequence[str], log: Callable[[str], None]) -> Iterator[dict[str, Path]]:
    """Export a model for those libraries that are peers into temporary folders, in processes of their own.

    Raises RuntimeError, with the reason, if an export fails.
    """
    with tempfile.TemporaryDirectory(prefix="minisd-peers-") as folder:
        graphs = {name: Path(folder) / name for name in libraries if name in PEERS}
        for name, path in graphs.items():
            log(f"export: {name}")
            command = [sys.executable, "-m", "minisd", "export", str(source), str(path), "--to", PEERS[name]]
            done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"the export for {name} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        yield graphs


class Peer(Minisd):
    """minisd with its UNet and its decoder computed by another runtime."""

    graphs: Path  # the folder of the exported model, set before `load`

    def __init__(self, name: str) -> None:
        self.name = name

    def load(self, folder: str, device: str, dtype: torch.dtype, compiled: bool | str) -> None:
        """Load the model, and put the graphs in the place of its UNet and its decoder.

        Raises ValueError for a device, dtype or compilation that the runtime is not measured with.
        """
        if device != "cpu" or compiled:
            raise ValueError(f"{self.name} is measured on a CPU only, and not compiled by torch")
        if dtype not in ((torch.float32, torch.bfloat16) if self.name == "openvino" else (torch.float32,)):
            raise ValueError(f"{self.name} is not measured in {str(dtype).removeprefix('torch.')}; use float32")
        super().load(folder, device, torch.float32, False)
        start = openvino_graph if self.name == "openvino" else onnx_graph
        unet, decoder = start(self.graphs / "unet", dtype), start(self.graphs / "vae_decoder", dtype)

        def predict(sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
            inputs = {"sample": sample, "timestep": timestep.expand(len(sample)), "encoder_hidden_states": context}
            return _call(unet, inputs)

        network: Any = self.sd.unet
        network.forward = predict
        autoencoder: Any = self.sd.autoencoder
        autoencoder.decode = lambda latents: _call(decoder, {"latent_sample": latents})


def _call(run: Run, inputs: dict[str, Tensor]) -> Tensor:
    return torch.from_numpy(np.array(run({name: value.contiguous().numpy() for name, value in inputs.items()})))


def openvino_graph(folder: Path, dtype: torch.dtype) -> Run:
    """Compile an exported graph for the CPU, to be computed in float32 or bfloat16, with torch's number of threads."""
    import openvino

    precision = "bf16" if dtype == torch.bfloat16 else "f32"
    hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(folder / "model.xml", "CPU", hints)
    return lambda inputs: compiled(inputs)[0]


def onnx_graph(folder: Path, dtype: torch.dtype) -> Run:
    """Load an exported graph in float32, with torch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)[0]
