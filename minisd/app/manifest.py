"""The manifest: a list of all images of a prompts file, with seeds, written before the first one is drawn.

It also fixes the batches, so a run that is resumed, or distributed with `torchrun`, writes the same files as an
uninterrupted one.
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from minisd.app.jobs import Job, batches, draw
from minisd.features.distributed import process_group, rank, rank_zero_first, show, sum_over_ranks, world_size
from minisd.io.atomic import save_atomically
from minisd.io.configs import parse_json
from minisd.pipeline.checks import resolve_seeds
from minisd.pipeline.metadata import KEY, save_png
from minisd.pipeline.prompting import read_prompts
from minisd.pipeline.provenance import Provenance
from minisd.pipeline.stable_diffusion import StableDiffusion

MANIFEST = "manifest.jsonl"
# temporary files of killed processes
LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.png|\.manifest\.jsonl\.[0-9a-f]{8}\.tmp")
ADVICE = "choose another folder, or redraw all pictures with --overwrite"


def check_jobs(jobs: Sequence[Job], sd: StableDiffusion) -> None:
    """Raise ValueError for the first invalid job, including its line in the prompts file."""
    checked: set[Any] = set()
    for job in jobs:
        try:
            if job.seed is not None:
                resolve_seeds(job.seed, 1)
            prompts = job.prompt, job.negative_prompt, job.settings.num_inference_steps
            if prompts not in checked:
                read_prompts(sd, [job.prompt], [job.negative_prompt], job.settings.num_inference_steps)
                checked.add(prompts)
            if (job.settings, job.source) not in checked:
                job.check(sd)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{job.where}: {error}") from error
        checked.add((job.settings, job.source))


def write_manifest(jobs: Sequence[Job], provenance: Provenance, folder: Path, overwrite: bool) -> None:
    """Write the manifest of a new run, with a seed per image, or check that an existing one matches the jobs.

    Removes temporary files of killed runs. Raises ValueError if the folder contains other images.
    """
    path = folder / MANIFEST
    if path.exists() and not overwrite:
        read_manifest(jobs, provenance, folder)
        _remove_leftovers(folder)
        return
    if not overwrite and (there := [job.file for job in jobs if (folder / job.file).exists()]):
        raise ValueError(f"{folder} already contains {there[0]}, but no {MANIFEST}; {ADVICE}")
    seeded: list[Job] = []
    for job in jobs:
        if job.seed_drawn:
            # images of the same line have consecutive seeds
            follows = seeded and seeded[-1].where == job.where
            job = replace(job, seed=(seeded[-1].seed or 0) + 1 if follows else resolve_seeds(None, 1)[0])
        seeded.append(job)
    lines = [json.dumps(_record(job, provenance), ensure_ascii=False) + "\n" for job in seeded]
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    save_atomically(lambda temporary: temporary.write_text("".join(lines), encoding="utf-8"), path)


def read_manifest(jobs: Sequence[Job], provenance: Provenance, folder: Path) -> list[Job]:
    """Return the jobs with the seeds from the manifest. Raises ValueError if it belongs to other jobs."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8").removesuffix("\n")
        lines = [parse_json(line) for line in text.split("\n")]  # splitlines() also splits at U+2028
        numbers = resolve_seeds([line["seed"] for line in lines], len(lines))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is corrupted ({error}); {ADVICE}") from error
    if len(lines) != len(jobs):
        raise ValueError(f"{path} belongs to other prompts: it has {len(lines)} pictures, not {len(jobs)}; {ADVICE}")
    for number, (line, job, seed) in enumerate(zip(lines, jobs, numbers, strict=True), 1):
        expected = _record(replace(job, seed=seed) if job.seed_drawn else job, provenance)
        names = sorted({**line, **expected}, key="file".__eq__)  # last, since it depends on the prompt
        for name in names:
            if line.get(name) != expected.get(name):
                raise ValueError(
                    f"{path} belongs to other prompts or settings: on line {number}, {name} is {line.get(name)!r}, "
                    f"expected {expected.get(name)!r}; {ADVICE}"
                )
    return [replace(job, seed=seed) for job, seed in zip(jobs, numbers, strict=True)]


def _record(job: Job, provenance: Provenance) -> dict[str, Any]:
    return {"file": job.file, "seed_drawn": job.seed_drawn} | job.record(provenance)


def _remove_leftovers(folder: Path) -> None:
    for file in folder.iterdir():
        if LEFTOVER.fullmatch(file.name):
            file.unlink(missing_ok=True)


def is_complete(path: Path, text: str) -> bool:
    """Return whether a file is an intact PNG with exactly these `parameters`."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            written = picture.info.get(KEY)
            picture.verify()  # checks all checksums
    except Exception:  # missing, truncated or not a PNG
        return False
    return written == text


def _prepare(jobs: Sequence[Job], sd: StableDiffusion, provenance: Provenance, folder: Path, overwrite: bool) -> None:
    check_jobs(jobs, sd)
    write_manifest(jobs, provenance, folder, overwrite)


def draw_missing(
    sd: StableDiffusion,
    jobs: Sequence[Job],
    folder: Path,
    *,
    provenance: Provenance,
    overwrite: bool,
    quiet: bool,
    log: Callable[[str], None],
) -> None:
    """Draw the jobs whose images are missing, distributed over torchrun's processes, and print the new file names."""
    if world_size() > 1:  # torchrun terminates all processes if one fails; let them clean up
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with process_group(sd.device):
        rank_zero_first(partial(_prepare, jobs, sd, provenance, folder, overwrite))
        jobs = read_manifest(jobs, provenance, folder)
        log(f"{len(jobs)} pictures, planned in {folder / MANIFEST}")
        started, drawn, there = time.perf_counter(), 0, 0
        for batch in list(batches(jobs))[rank() :: world_size()]:
            texts = [job.parameters(provenance) for job in batch]
            files = [folder / job.file for job in batch]
            missing = [overwrite or not is_complete(*pair) for pair in zip(files, texts, strict=True)]
            there += missing.count(False)
            if not any(missing):
                continue
            pictures = draw(sd, batch, False if quiet or rank() else None)
            for job, picture, file, text, absent in zip(batch, pictures, files, texts, missing, strict=True):
                if absent:
                    show(save_png(picture, file, text, overwrite=True, record=job.record(provenance)))
                    drawn += 1
        drawn, there = sum_over_ranks(drawn, there)
        log(f"{drawn} drawn, {there} already existed, in {time.perf_counter() - started:.1f} s")
