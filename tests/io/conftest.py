"""A small random model, and the folder that diffusers and transformers write of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from os import PathLike
from pathlib import Path
from unittest import mock

import pytest
from checkpoints import SMALL, Parts, compvis_state, make_parts, write_folder
from torch import Tensor

from minisd import Tokenizer
from minisd.io import checkpoint

words, read = cache(Tokenizer.from_pretrained), checkpoint.read_tokenizer
words_by_content: dict[tuple[tuple[str, bytes], ...], Tokenizer] = {}


def words_of_folder(folder: str | PathLike[str]) -> Tokenizer:
    files = sorted(Path(folder).iterdir())
    content = tuple((path.name, sha256(path.read_bytes()).digest()) for path in files)
    if content not in words_by_content:
        words_by_content[content] = read(folder)
    return words_by_content[content]


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """The words of Stable Diffusion 1, and those of the same files, are read once: no tokenizer ever changes."""
    of_one = mock.patch.object(Tokenizer, "from_pretrained", words)
    with of_one, mock.patch.object(checkpoint, "read_tokenizer", words_of_folder):
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
