"""Pictures and captions in WebDataset shards: tar files in which files of one name, such as 000.jpg and 000.txt, follow
each other. They are read once, from front to back, and nothing is unpacked to the disk.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from minisd.features.prompts import check_length
from minisd.features.validate import check_strings
from minisd.io.configs import parse_json
from minisd.io.pictures import read_picture
from minisd.training.folder_data import CAPTIONS, SUFFIXES

LARGEST = 2**28  # bytes of one file in a shard


def list_shards(folder: Path) -> list[Path]:
    """List the tar files of a folder. Raises ValueError if there are pictures beside them."""
    shards = sorted(path for path in folder.glob("*.tar") if path.is_file())
    if shards and (pictures := [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]):
        raise ValueError(f"{folder} has both {shards[0].name} and {pictures[0].name}; keep shards or pictures there")
    return shards


def read_shard(path: Path, side: int, caption: str | None = None) -> Iterator[tuple[np.ndarray, str]]:
    """Read the samples of a shard: pictures (side, side, 3) uint8, scaled and cropped, and captions.

    The caption of 000.jpg is 000.txt or 000.caption, or "caption" or "text" in 000.json, or else `caption`.

    Raises ValueError for a damaged shard, a link or device in it, a broken picture, or a sample without a caption.
    """
    try:
        with tarfile.open(path, "r:") as shard:
            for key, files in groupby(_files(shard), key=lambda item: item[0]):
                contents = {suffix: content for _, suffix, content in files}
                if found := [suffix for suffix in contents if suffix in SUFFIXES]:
                    picture = read_picture(Path(key + found[0]), side, side, data=contents[found[0]])
                    yield np.asarray(picture), _caption(key, contents, caption)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _files(shard: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    """Key, suffix and content of each file: the key of a/0.b.txt is a/0, and its suffix .b.txt."""
    for member in shard:
        folder, slash, name = member.name.rpartition("/")
        if member.isdir() or name.startswith((".", "__")):
            continue
        if not member.isreg() or member.size > LARGEST:
            raise ValueError(f"{member.name} is no regular file of at most {LARGEST:,} bytes; leave it out")
        content = shard.extractfile(member)
        assert content is not None
        stem, dot, suffix = name.partition(".")
        yield folder + slash + stem, (dot + suffix).lower(), content.read()


def _caption(key: str, contents: dict[str, bytes], caption: str | None) -> str:
    """Return the caption of a sample."""
    texts = [contents[suffix].decode("utf-8-sig") for suffix in CAPTIONS if suffix in contents]
    if not texts and ".json" in contents:
        values = parse_json(contents[".json"].decode("utf-8-sig"))
        fields = values if isinstance(values, dict) else {}
        texts = [fields[name] for name in ("caption", "text") if isinstance(fields.get(name), str)]
    if not texts and caption is None:
        raise ValueError(f"{key} has no caption; put {key.rpartition('/')[2]}.txt beside it")
    (text,) = check_strings("text", " ".join((texts[0] if texts else str(caption)).split()))
    check_length(text)
    return text
