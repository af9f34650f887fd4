"""What all tests share: no network, few threads, a word about real weights, and a small random model."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is first imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else processes that share cores slow each other many times over
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

REAL = "set MINISD_MODEL to a hub id, a folder or a file with published weights"


FULL_SIZE = ("test_end_to_end", "test_autoencoder", "test_checkpoint", "test_text_encoder", "test_unet")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under `-n 2` each process takes a whole file at a time, in the order of the collection.

    One process takes all files that build full-size models: two of these at a time might not fit into memory.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scope: str = super()._split_scope(nodeid)
            return "full size" if Path(scope).stem in FULL_SIZE else scope

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run files, and tests within them, in another order")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is quick, and order the tests.

    quick: the tests of core and parity, and one picture from the command line, but for what is marked slow or full.
    """
    for item in items:
        folder = item.path.parent.name
        if (folder in ("core", "parity") or item.path.name == "test_cli.py") and not any(
            item.get_closest_marker(name) for name in ("slow", "full", "real")
        ):
            item.add_marker(pytest.mark.quick)
        if item.get_closest_marker("full"):
            item.add_marker(pytest.mark.timeout(1200))
        if item.get_closest_marker("real") and not os.environ.get("MINISD_MODEL"):
            item.add_marker(pytest.mark.skip(reason=REAL))
    # the longest files come first, so that under `-n 2` no process is left with one of them at the end
    items.sort(key=_place)
    if (seed := config.getoption("--shuffle")) is not None:
        cells = [item for item in items if item.path.suffix == ".ipynb"]  # their order is their meaning
        tests = [item for item in items if item.path.suffix != ".ipynb"]
        shuffled = random.Random(seed)
        places = {path: shuffled.random() for path in {item.path for item in tests}}
        shuffled.shuffle(tests)
        items[:] = [*cells, *sorted(tests, key=lambda item: places[item.path])]


def _place(item: pytest.Item) -> int:
    if item.get_closest_marker("full"):
        return 0
    if item.path.suffix == ".ipynb":
        return 1 if item.path.parent.name == "notebooks" else 3
    return 2 if item.path.parent.name in ("training", "robustness") else 4


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not os.environ.get("MINISD_MODEL"):
        terminalreporter.section("REAL WEIGHTS WERE NOT TESTED", yellow=True)
        terminalreporter.line(f"To test them, {REAL}, and run: python -m pytest -m real")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random model for 32×32 pictures, which knows the words "fox", "snow" and "red" only."""
    from dataclasses import replace

    import torch
    from models import SMALL

    from minisd import Autoencoder, Sampler, StableDiffusion, TextEncoder, Tokenizer, UNet
    from minisd.io.diffusers_folder import Defaults

    text = replace(SMALL.text_encoder, num_hidden_layers=1)
    vae, unet = replace(SMALL.autoencoder, sample_size=32), replace(SMALL.unet, sample_size=4)
    config = replace(SMALL, text_encoder=text, autoencoder=vae, unet=unet)
    torch.manual_seed(0)
    tokenizer, encoder = Tokenizer.from_pretrained(), TextEncoder(text)
    known = [tokenizer.bos_token_id, tokenizer.eos_token_id, *tokenizer.encode("fox snow red")]
    table = encoder.token_embedding.weight.data
    table[[row for row in range(len(table)) if row not in known]] = 0
    defaults = Defaults(Sampler("dpmpp_2m", karras=True), num_inference_steps=3, guidance_scale=4.0)
    model = StableDiffusion(config, tokenizer, encoder, UNet(unet), Autoencoder(vae), defaults)
    folder = tmp_path_factory.mktemp("models") / "small"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def run(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, list[str], str]]:
    """Run `minisd` in an empty folder, and return its exit code, the lines it printed, and its standard error."""
    from minisd.app import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MINISD_DEBUG", raising=False)

    def command(*arguments: str, model: str | None = str(small_model)) -> tuple[int, list[str], str]:
        chosen = ["--model", model] if arguments[0] in ("generate", "interpolate") and model else []
        code = cli.main([*arguments, *chosen])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out.splitlines(), err

    return command


@pytest.fixture(scope="session")
def full_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A random Stable Diffusion 1.5 of full size, float32: the folder that diffusers writes, and one CompVis file."""
    from checkpoints import compvis_state, make_parts, write_folder
    from safetensors.torch import save_file

    from minisd import SD15

    place = tmp_path_factory.mktemp("full")
    parts = make_parts(SD15)
    folder = write_folder(place / "model", parts)
    save_file(compvis_state(parts), place / "model.safetensors")
    del parts
    yield folder, place / "model.safetensors"
    shutil.rmtree(place)


@pytest.fixture
def real_model() -> str:
    """The published model that MINISD_MODEL names."""
    return os.environ["MINISD_MODEL"]
