"""Pictures of one model on two devices and in two precisions, before anything is timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from minisd.bench.worker import Minisd, noise

FLOAT32_LIMIT = 2  # largest difference of a pixel, in 1/255
HALF_LIMIT = 3.0  # mean difference
STEPS = 4


def parity(folder: Path, device: str, dtype: str) -> list[dict[str, Any]]:
    """Draw one picture on the CPU in float32, and the same on a device in float32 and in `dtype`.

    Returns a row for each with the largest and the mean difference of the pixels from the first, in 1/255, and whether
    they are within the limits.
    """
    drawn, before = dict[tuple[str, str], np.ndarray](), torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # which would round float32 to 10 bits
    try:
        for place, kind in (("cpu", "float32"), (device, "float32"), (device, dtype)):
            library = Minisd()
            library.load(str(folder), place, getattr(torch, kind), compiled=False)
            size = min(256, library.sd.unet.config.sample_size * library.sd.downscale)
            drawn[place, kind] = np.asarray(library.picture(noise(size, place), size, STEPS), dtype=int)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    rows = []
    for (place, kind), pixels in drawn.items():
        apart = np.abs(pixels - drawn["cpu", "float32"])
        within = bool(apart.max() <= FLOAT32_LIMIT if kind == "float32" else apart.mean() <= HALF_LIMIT)
        row = {"model": folder.name, "device": place, "dtype": kind, "size": size, "within": within}
        rows.append(row | {"largest": int(apart.max()), "mean": round(float(apart.mean()), 4)})
    return rows
