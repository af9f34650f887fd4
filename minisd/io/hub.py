"""Downloads from the Hugging Face hub: the files of one variant, cached and checked; finished files are kept."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants, errors

from minisd.io.diffusers_folder import STEMS, pick_weights
from minisd.io.tensors import CheckpointError

SMALL_FILES = (
    "model_index.json",
    "minisd.json",
    "scheduler/scheduler_config.json",
    *(f"{part}/config.json" for part in STEMS),
    *(f"tokenizer/{name}.json" for name in ("vocab", "tokenizer", "tokenizer_config", "special_tokens_map")),
    "tokenizer/merges.txt",
)


class HubError(OSError):
    """A model cannot be fetched from the hub; the message says why and what to do."""


def download(repo: str, variant: str | None = None, revision: str | None = None) -> Path:
    """Return the local folder of the hub's model "owner/name", after fetching what is not there yet.

    Only the files of one variant are fetched, without safety checker, feature extractor and other formats; the
    size is said first, on standard error. Where the hub cannot be reached the cache serves. Raises HubError for a
    model that does not exist, is gated, or is neither reachable nor cached; CheckpointError for one in another
    layout or with damaged files.
    """
    try:
        if constants.HF_HUB_OFFLINE:
            raise errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except errors.GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{repo}"
        raise HubError(f"{repo} is gated; accept its terms on {page}, then run `hf auth login`") from error
    except (OSError, errors.HTTPError, errors.HFValidationError) as error:  # type: ignore[attr-defined]
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
        if status not in (401, 403, 404) and not isinstance(error, errors.HFValidationError):
            return _cached(repo, revision, error)
        at = f" at revision {revision}" if revision else ""
        raise HubError(
            f"the hub has no model {repo}{at}, or it is private; check the name, or run `hf auth login`"
        ) from error
    if re.fullmatch(r"[0-9a-f]{40}", info.sha or "") is None:  # it becomes the name of a folder
        raise HubError(f"{constants.ENDPOINT} names {repo}'s version {info.sha!r}, which is none; do not trust it")
    wanted = choose_files((file.rfilename for file in info.siblings or ()), variant)
    if not wanted:
        raise CheckpointError(
            f"{repo} holds no Stable Diffusion folder with {', '.join(STEMS)}; download the single file that you want "
            "from its page, and give its path"
        )
    new = [
        file
        for file in info.siblings or ()
        if file.rfilename in wanted
        and not isinstance(huggingface_hub.try_to_load_from_cache(repo, file.rfilename, revision=info.sha), str)
    ]
    if new:
        size = sum(file.size or 0 for file in new)
        print(f"{repo}: downloading {len(new)} files, {size / 1e9:.2f} GB", file=sys.stderr, flush=True)
    bar = _bar_to(2**24 + 2 * sum(file.size or 0 for file in new))
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted, tqdm_class=bar))
    except (OSError, ValueError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        raise HubError(f"the download of {repo} broke off ({error}); run again, finished files are kept") from error
    if folder.name != info.sha:
        raise HubError(f"{repo} changed while it was downloaded; run again")
    _verify(folder, new)
    return folder


def _bar_to(limit: int) -> Any:
    """The client's progress bar, but a download that goes on beyond so many bytes is broken off."""

    class Bar(huggingface_hub.utils.tqdm):  # type: ignore[misc]
        seen = 0

        def update(self, n: float | None = 1) -> bool | None:
            self.seen += int(n or 0)
            if self.seen > limit:
                raise OSError(f"it sends more than {limit:,} bytes, far more than it said")
            return super().update(n)  # type: ignore[no-any-return]

    return Bar


def choose_files(names: Iterable[str], variant: str | None = None) -> list[str]:
    """Of a repository's file names, those that minisd needs; empty when a part has no weights there."""
    present = set(names)
    wanted = [name for name in SMALL_FILES if name in present]
    for part, stem in STEMS.items():
        inside = [name.removeprefix(f"{part}/") for name in present if name.startswith(f"{part}/")]
        weights = pick_weights(inside, stem, variant)
        if not weights:
            return []
        wanted += [f"{part}/{name}" for name in weights]
    return wanted


def _cached(repo: str, revision: str | None, reason: Exception) -> Path:
    with suppress(errors.HFValidationError):  # a name that no model can have
        index = huggingface_hub.try_to_load_from_cache(repo, "model_index.json", revision=revision)
        if isinstance(index, str):
            return Path(index).parent
    raise HubError(
        f"{repo} is not in the cache and the hub cannot be reached ({reason}); connect, unset HF_HUB_OFFLINE, or give "
        "a local folder"
    ) from reason


def _verify(folder: Path, files: Iterable[Any]) -> None:
    """Compare new files with the digests that the hub states; the hub's own client compares sizes only.

    It also lets the hub say where in the cache a file is kept; what lies elsewhere is not used.
    """
    cache = folder.parent.parent.resolve()
    for file in files:
        path = folder / file.rfilename
        if not path.resolve().is_relative_to(cache):
            path.unlink()
            raise HubError(f"{constants.ENDPOINT} put {file.rfilename} at {path.resolve()}; do not trust it")
        if file.lfs is None:
            continue
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != file.lfs.sha256:
            os.unlink(path.resolve())
            path.unlink(missing_ok=True)
            raise CheckpointError(
                f"{file.rfilename} arrived damaged (sha256 {digest[:12]}…) and was removed; run again"
            )
