"""Run notebooks on small random models that stand in for published ones.

    python tests/notebook_models.py                                     every notebook on all three
    python tests/notebook_models.py epsilon --notebook 11 --notebook 13

`float16` computes in half precision, `epsilon` predicts noise, and `512` draws 512×512 pixels. Each notebook stops at
the first cell that fails, which is printed; the exit status is the number of failures. Nothing is stored. As in a
published model's folder, there is no `clip/` in theirs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import nbformat
from models import SMALL, lively_model
from nbclient.exceptions import CellExecutionError

from minisd import Sampler
from minisd.config import ModelConfig
from minisd.io.diffusers_folder import Defaults

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
from regenerate import execute  # noqa: E402

# As in published text encoders, more layers and heads than the tiny model's four, and an MLP four times as wide.
TEXT = replace(SMALL.text_encoder, intermediate_size=64, num_hidden_layers=5, num_attention_heads=8)
DEEP = replace(SMALL, text_encoder=TEXT)
MODELS: dict[str, ModelConfig] = {
    "float16": DEEP,
    "epsilon": replace(DEEP, schedule=replace(DEEP.schedule, prediction_type="epsilon", timestep_spacing="leading")),
    "512": replace(
        DEEP,
        autoencoder=replace(DEEP.autoencoder, sample_size=512),
        unet=replace(DEEP.unet, sample_size=64),
    ),
}


def run(path: Path, name: str, folder: Path) -> bool:
    """Run one notebook on one model, and print how it went."""
    began, dtype = time.time(), "float16" if name == "float16" else None
    try:
        execute(nbformat.read(path, 4), path.parent, str(folder), timeout=1800, dtype=dtype)
        said = "passes"
    except CellExecutionError as error:
        said = f"FAILS\n{error}"
    print(f"{path.stem} on {name}: {said}, {time.time() - began:.0f} s", flush=True)
    return said == "passes"


def main() -> int:
    parser = argparse.ArgumentParser(description="Run notebooks on small random models.")
    parser.add_argument("models", nargs="*", help=f"which models, of {', '.join(MODELS)}; by default all")
    parser.add_argument("--notebook", action="append", default=[], help="the beginning of a name, such as 11")
    choices = parser.parse_args()
    paths = [p for p in sorted(NOTEBOOKS.glob("*.ipynb")) if p.name.startswith(tuple(choices.notebook) or "")]
    if unknown := [name for name in choices.models if name not in MODELS]:
        parser.error(f"unknown model {unknown[0]!r}; choose from {', '.join(MODELS)}")
    if not paths:
        parser.error(f"no notebook begins with {' or '.join(choices.notebook)}")
    defaults = Defaults(Sampler("dpmpp_2m", karras=True), num_inference_steps=4, guidance_scale=4.0)
    passed = []
    with tempfile.TemporaryDirectory() as place:
        for name in choices.models or MODELS:
            folder = Path(place) / name
            lively_model(MODELS[name], defaults).save_pretrained(folder)
            passed += [run(path, name, folder) for path in paths]
    return passed.count(False)


if __name__ == "__main__":
    sys.exit(main())
