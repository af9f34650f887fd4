"""Atomic writes of files and folders: readers, and crashes at any time, see either the old or the new version."""

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
    """Call `write` with a temporary path, then rename the file to `path`. Symlinks are replaced, not followed.

    A killed process may leave a hidden .tmp file behind, which is safe to delete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors creates files with mode 600
        os.replace(temporary, path)
    except (SafetensorError, RuntimeError) as error:  # raised by safetensors and torch when the disk is full
        raise OSError(f"failed to write {path} ({error}); check that the disk is not full") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder that replaces `target` on success and is removed on failure.

    Files that exist only in the old folder are hard-linked into the new one. Memory maps of old files stay valid. A
    killed process may leave a folder .NAME.….tmp next to the target, which is safe to delete.
    """
    check_writable(target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = _temporary(target)
    new.mkdir()
    try:
        yield new
        # in the system's temporary folder, since filelock does not delete its lock files
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
    elif os.path.ismount(target):  # mount points cannot be renamed
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
        _link_missing(old, target)  # files written in the meantime
        shutil.rmtree(old, ignore_errors=True)


def _link_missing(source: Path, target: Path) -> None:
    """Hard-link, or else copy, all files of `source` that are missing in `target`."""
    for path in source.rglob("*"):
        place = target / path.relative_to(source)
        if path.is_dir() and not path.is_symlink():
            place.mkdir(parents=True, exist_ok=True)
        elif not os.path.lexists(place):
            try:
                os.link(path, place, follow_symlinks=False)
            except OSError:
                shutil.copy2(path, place, follow_symlinks=False)
