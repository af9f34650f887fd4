"""Writing files and folders so that a reader, or a kill at any time, finds the old version or the new one."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError

from minisd.features.validate import check_writable


def save_atomically(write: Any, path: Path) -> None:
    """Call `write(temporary path)`, then rename the finished file to `path`; a link is replaced, not followed.

    A kill may leave the temporary file, hidden and ending in .tmp; it can be deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes its files readable by the owner only
        os.replace(temporary, path)
    except (SafetensorError, RuntimeError) as error:  # raised by safetensors and torch when the disk is full
        raise OSError(f"{path} could not be written ({error}); is the disk full?") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder, which takes the place of `target` at the end of the block; on failure it is removed.

    Files that only the old folder has are linked into the new one. Programs that have mapped the old files keep them. A
    kill may leave a folder .NAME.….tmp beside the target, complete or not; it can be deleted.
    """
    check_writable(target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = _temporary(target)
    new.mkdir()
    try:
        yield new
        # in the temporary folder, since filelock leaves its files behind
        name = f"minisd-{getattr(os, 'getuid', int)()}-{hashlib.sha256(os.fsencode(target)).hexdigest()[:16]}.lock"
        with FileLock(Path(tempfile.gettempdir()) / name):
            _exchange(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def _exchange(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
    elif os.path.ismount(target):  # which cannot be renamed
        for path in (path for path in new.rglob("*") if path.is_file()):
            place = target / path.relative_to(new)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    else:
        _link_missing(target, new)
        old = new.with_suffix(".old.tmp")
        target.rename(old)
        try:
            new.rename(target)
        except OSError:
            old.rename(target)
            raise
        _link_missing(old, target)  # files written in between
        shutil.rmtree(old, ignore_errors=True)


def _link_missing(source: Path, target: Path) -> None:
    """Link, or else copy, all files of a folder that another one lacks."""
    for path in source.rglob("*"):
        place = target / path.relative_to(source)
        if path.is_dir() and not path.is_symlink():
            place.mkdir(parents=True, exist_ok=True)
        elif not os.path.lexists(place):
            try:
                os.link(path, place, follow_symlinks=False)
            except OSError:
                shutil.copy2(path, place, follow_symlinks=False)
