"""Cached and verified downloads from the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants, errors

from minisd.io.atomic import save_atomically
from minisd.io.configs import read_json, write_json
from minisd.io.diffusers_folder import STEMS, pick_weights
from minisd.io.tensors import CheckpointError

SMALL_FILES = (
    "model_index.json",
    "minisd.json",
    "scheduler/scheduler_config.json",
    *(f"{part}/config.json" for part in STEMS),
    *(f"tokenizer/{name}.json" for name in ("vocab", "tokenizer", "tokenizer_config", "special_tokens_map")),
    "tokenizer/added_tokens.json",
    "tokenizer/merges.txt",
)


class HubError(OSError):
    """Raised if a model cannot be downloaded."""


def download(repo: str, variant: str | None = None, revision: str | None = None, vae: bool = False) -> Path:
    """Download the files of a model that are not cached, and return its local folder.

    Only the files of one variant are downloaded; their total size is printed to stderr first. Falls back to the cache
    when offline.

    Args:
        repo: The hub id, "owner/name".
        variant: The variant of the weight files, such as "fp16".
        revision: The branch, tag or commit.
        vae: Whether to download an autoencoder only: that of a model, or a repository of its own.

    Raises:
        HubError: If the model does not exist, is gated, or is neither reachable nor cached.
        CheckpointError: If the model is not a diffusers folder, or a file is corrupted.
    """
    try:
        info = _model_info(repo, revision)
    except HubError:
        raise
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        return _cached(repo, variant, revision, error, vae)
    files = {file.rfilename: file for file in info.siblings or ()}
    chosen = choose_files(files, variant, vae)
    if not chosen:
        wanted = "an autoencoder" if vae else f"a Stable Diffusion model with {', '.join(STEMS)}"
        raise CheckpointError(
            f"{repo} is not {wanted} in diffusers format; to use a single "
            "file, download it from the model page and pass its path"
        )
    find = huggingface_hub.try_to_load_from_cache
    new = [name for name in chosen if not isinstance(find(repo, name, revision=info.sha), str)]
    size = sum(files[name].size or 0 for name in new)
    if new:
        logging.getLogger("minisd").warning(f"{repo}: downloading {len(new)} files, {size / 1e9:.2f} GB")
    bar = _limited_bar(2**24 + 2 * size)
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=chosen, tqdm_class=bar))
    except (OSError, ValueError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        raise HubError(f"the download of {repo} failed ({error}); retry to resume it") from error
    if folder.name != info.sha:
        raise HubError(f"{repo} changed during the download; retry")
    _check_places(folder, chosen)
    _verify(folder, {name: file.lfs.sha256 for name in chosen if (file := files[name]).lfs is not None})
    return folder


def _model_info(repo: str, revision: str | None) -> Any:
    """Fetch a model's metadata. Raises HubError if it does not exist, and other errors if the hub is unreachable."""
    try:
        if constants.HF_HUB_OFFLINE:
            raise errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except errors.GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{repo}"
        raise HubError(f"{repo} is gated; accept its terms on {page}, then run `hf auth login`") from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code not in (401, 403, 404):
            raise
        name = f"{repo} at revision {revision}" if revision else repo
        raise HubError(
            f"model {name} does not exist on the hub or is private; check the name, or run `hf auth login`"
        ) from error
    if re.fullmatch(r"[0-9a-f]{40}", info.sha or "") is None:  # used as a folder name
        raise HubError(f"{constants.ENDPOINT} sent an invalid commit hash for {repo} ({info.sha!r}); do not trust it")
    return info


def choose_files(names: Iterable[str], variant: str | None = None, vae: bool = False) -> list[str]:
    """Return the files of a repository to download, or an empty list if a module has no weights."""
    present = set(names)
    if vae:
        folder = "vae/" if "model_index.json" in present else ""
        inside = [name.removeprefix(folder) for name in present if name.startswith(folder)]
        weights = pick_weights(inside, STEMS["vae"], variant)
        small = {"model_index.json", f"{folder}config.json"} & present
        return [*sorted(small), *(f"{folder}{name}" for name in weights)] if weights else []
    chosen = [name for name in SMALL_FILES if name in present]
    for part, stem in STEMS.items():
        inside = [name.removeprefix(f"{part}/") for name in present if name.startswith(f"{part}/")]
        weights = pick_weights(inside, stem, variant)
        if not weights:
            return []
        chosen += [f"{part}/{name}" for name in weights]
    return chosen


def _limited_bar(limit: int) -> Any:
    """Return a progress bar class for the hub client that aborts a download after `limit` bytes."""

    class Bar(huggingface_hub.utils.tqdm):  # type: ignore[misc]
        received = 0

        def update(self, n: float | None = 1) -> bool | None:
            self.received += int(n or 0)
            if self.received > limit:
                raise OSError(f"received more than {limit:,} bytes, far more than announced")
            return super().update(n)  # type: ignore[no-any-return]

    return Bar


def _verified(folder: Path, variant: str | None, vae: bool) -> Path:
    chosen = choose_files((path.relative_to(folder).as_posix() for path in folder.rglob("*")), variant, vae)
    _check_places(folder, chosen)
    # the cache names large files after their SHA-256
    named = {name: (folder / name).resolve().name for name in chosen}
    named = {name: digest for name, digest in named.items() if re.fullmatch("[0-9a-f]{64}", digest)}
    _verify(folder, named | {name: entry[0] for name, entry in _read_record(folder).items() if name in chosen})
    return folder


def _cached(repo: str, variant: str | None, revision: str | None, reason: Exception, vae: bool = False) -> Path:
    """Return the cached folder of a model. Files that were never verified are hashed now."""
    with suppress(errors.HFValidationError):  # an invalid name
        for index_name in ("model_index.json", *(["config.json"] if vae else [])):
            index = huggingface_hub.try_to_load_from_cache(repo, index_name, revision=revision)
            if isinstance(index, str):
                return _verified(Path(index).parent, variant, vae)
    raise HubError(
        f"{repo} is not in the cache and the hub cannot be reached ({reason}); check the connection, unset "
        "HF_HUB_OFFLINE, or pass a local folder"
    ) from reason


def _check_places(folder: Path, names: Iterable[str]) -> None:
    """Raise HubError for a file outside the cache."""
    cache = folder.parent.parent.resolve()
    for name in names:
        path = folder / name
        if not path.resolve().is_relative_to(cache):
            path.unlink()
            raise HubError(f"{constants.ENDPOINT} placed {name} at {path.resolve()}; do not trust it")


def _verify(folder: Path, digests: Mapping[str, str]) -> None:
    """Compare files with their SHA-256, except those recorded as verified; the client compares only sizes.

    A file that matches is recorded at once, any other is removed. Raises CheckpointError with the names of the latter.
    """
    damaged: dict[Path, str] = {}
    record = _read_record(folder)
    record = {name: [digest, 0, 0] for name, digest in digests.items()} | record  # so that offline runs know them
    _write_record(folder, record)
    for name, expected in digests.items():
        path = folder / name
        status = path.stat()
        entry = [expected, status.st_size, status.st_mtime_ns]
        if record[name] == entry:
            continue
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest == expected:
            record[name] = entry
            _write_record(folder, record)
        else:
            damaged[path] = f"{name} was corrupted in transit (sha256 {digest[:12]}…)"
    for path in damaged:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    if damaged:
        raise CheckpointError(f"{', '.join(damaged.values())} and has been removed; retry")


def _record_path(folder: Path) -> Path:
    return folder.parent.parent / f"minisd-verified-{folder.name}.json"


def _read_record(folder: Path) -> dict[str, list[Any]]:
    """Return the SHA-256, size and modification time of each verified file; 0 for both before it is verified."""
    try:
        record = read_json(_record_path(folder))
    except CheckpointError:
        return {}
    return {
        name: entry
        for name, entry in record.items()
        if isinstance(entry, list) and len(entry) == 3 and re.fullmatch("[0-9a-f]{64}", str(entry[0]))
    }


def _write_record(folder: Path, record: Mapping[str, list[Any]]) -> None:
    if record != _read_record(folder):
        with suppress(OSError):  # in a cache that cannot be written, files are hashed each time
            save_atomically(lambda temporary: write_json(temporary, record), _record_path(folder))
