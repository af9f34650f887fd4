"""A small random model, and the folder that diffusers and transformers write of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
from checkpoints import SMALL, Parts, compvis_state, make_parts, write_folder
from torch import Tensor

from minisd import Tokenizer

words = cache(Tokenizer.from_pretrained)


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """The words of Stable Diffusion 1, which every single file takes, are read once: no tokenizer ever changes."""
    with mock.patch.object(Tokenizer, "from_pretrained", words):
        yield


@pytest.fixture(scope="module")
def parts() -> Parts:
    return make_parts(SMALL)


@pytest.fixture(scope="module")
def written(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("written") / "model", parts)


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "model"))


@pytest.fixture(scope="module")
def state(parts: Parts) -> dict[str, Tensor]:
    """The tensors of all parts under CompVis' names."""
    return compvis_state(parts)
