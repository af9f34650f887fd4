"""Draw with two checkouts of minisd on the same machine, and compare the pictures bit for bit.

    python tools/same_pictures.py                      # this checkout and commit 6bd0a67
    python tools/same_pictures.py --base ../other --only lora

Both load the same model folder, are called through the public API only, and run in processes of one thread. Prints a
line for each case, and exits with code 1 if any case differs or fails. The cases are in `picture_cases.py` and
`model_cases.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "6bd0a67"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help=f"a checkout to compare with (default: a worktree of {COMMIT})")
    parser.add_argument("--model", type=Path, help="the model folder (default: the shipped model of the base)")
    parser.add_argument("--only", default="", help="a regular expression; draw the cases whose names match")
    parser.add_argument("--draw", nargs=2, type=Path, metavar=("INPUTS", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, metavar="INPUTS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_inputs(options.write)
        return 0
    if options.draw:
        return draw(*options.draw, options.model, options.only)
    with tempfile.TemporaryDirectory() as place:
        if options.base:
            return compare(options.base.resolve(), Path(place), options)
        base = Path(place) / COMMIT
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(base), COMMIT], check=True, capture_output=True)
        try:
            return compare(base, Path(place), options)
        finally:
            subprocess.run([*git, "remove", "--force", str(base)], check=True)


def compare(base: Path, place: Path, options: argparse.Namespace) -> int:
    """Run both checkouts at the same time, and print the differences."""
    model = (options.model or base / "minisd/assets/tiny").resolve()
    inputs, outputs = place / "inputs", {"base": place / "base.npz", "here": place / "here.npz"}
    start(base, base / "tests", "--write", inputs).check_returncode()
    children = [
        start(root, "--draw", inputs, out, "--model", model, "--only", options.only, wait=False)
        for root, out in zip((base, ROOT), outputs.values(), strict=True)
    ]
    if codes := [code for child in children if (code := child.wait())]:
        print(f"a process ended with exit code {codes[0]}")
        return 1
    then, now = (dict(np.load(out)) for out in outputs.values())
    cases = list(dict.fromkeys(name.split(" / ")[0] for name in [*then, *now]))
    failures = 0
    for case in cases:
        result = verdict(*({k: v for k, v in some.items() if k.split(" / ")[0] == case} for some in (then, now)))
        failures += result != "identical"
        print(f"{case:60} {result}")
    print(f"{len(cases)} cases, {len(cases) - failures} identical, {failures} not")
    return 1 if failures or not cases else 0


def start(root: Path, *arguments: Any, wait: bool = True) -> Any:
    """Run this script with the package of a checkout, in a process of one thread."""
    extra = [str(argument) for argument in arguments if isinstance(argument, Path) and argument.name == "tests"]
    path = os.pathsep.join([str(root), *extra])
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    environment = (
        os.environ
        | threads
        | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONDONTWRITEBYTECODE": "1"}
    )
    rest = [str(argument) for argument in arguments if str(argument) not in extra]
    command = [sys.executable, str(Path(__file__).resolve()), *rest]
    return (subprocess.run if wait else subprocess.Popen)(command, env=environment, cwd=tempfile.gettempdir())


def verdict(then: dict[str, Any], now: dict[str, Any]) -> str:
    """Compare the arrays of one case: "identical", or how they differ."""
    for side, some in (("base", then), ("here", now)):
        if not some:
            return f"not drawn by {side}"
        for name, value in some.items():
            if name.endswith(" / error"):
                return f"{side} raises {value}"
    if then.keys() != now.keys():
        return f"{len(then)} arrays, now {len(now)}"
    for name, old in then.items():
        new = now[name]
        if old.dtype != new.dtype or old.shape != new.shape:
            return f"{old.dtype}{list(old.shape)}, now {new.dtype}{list(new.shape)}"
        if old.tobytes() != new.tobytes():
            apart = np.abs(old.astype(float) - new.astype(float))
            return f"DIFFERS in {name.split(' / ')[1]}: {(apart > 0).mean():.2%} of it, by {apart.max():.3g} at most"
    return "identical"


def write_inputs(folder: Path) -> None:
    """Write small random models and adapters, with the helpers in the tests of the base checkout."""
    from dataclasses import replace

    import torch
    from checkpoints import SMALL, SMALL_2, make_parts, write_folder
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    sizes = {"sd1": SMALL, "sd2": SMALL_2, "inpaint": replace(SMALL, unet=replace(SMALL.unet, in_channels=9))}
    for number, (name, config) in enumerate(sizes.items()):
        write_folder(folder / name, make_parts(config, seed=number))
    scheduler = folder / "sd2/scheduler/scheduler_config.json"
    scheduler.write_text(
        json.dumps(json.loads(scheduler.read_text(encoding="utf-8")) | {"prediction_type": "v_prediction"})
    )
    write_folder(folder / "half", make_parts(SMALL, seed=3), torch.float16, variant="fp16")
    generator = torch.Generator().manual_seed(7)
    for name, tokens in (("<one>", 1), ("<three>", 3)):
        vectors = torch.randn(tokens, 128, generator=generator) * 0.3
        save_file({name: vectors if tokens > 1 else vectors[0]}, folder / f"{name[1:-1]}.safetensors")


def write_loras(folder: Path, model: Path) -> None:
    """Write LoRAs for the model: one of the attention layers in peft's layout, one of all layers in kohya's."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(11)
    parts = {"unet": "unet/diffusion_pytorch_model", "text_encoder": "text_encoder/model"}
    peft, kohya = {}, {}
    for part, file in parts.items():
        for key, weight in load_file(model / f"{file}.safetensors").items():
            layer = key.removesuffix(".weight").removeprefix("text_model.")
            if not key.endswith(".weight") or weight.ndim < 2 or "embedding." in key or "norm" in key:
                continue
            down = torch.randn(4, *weight.shape[1:], generator=generator) * weight[0].numel() ** -0.5
            up = torch.randn(len(weight), 4, *(1 for _ in weight.shape[2:]), generator=generator) * 0.1
            if re.search(r"to_[qkv]|to_out|[qkv]_proj|out_proj", layer):
                peft |= {f"{part}.{layer}.lora_A.weight": down, f"{part}.{layer}.lora_B.weight": up}
            stem = ("lora_unet_" if part == "unet" else "lora_te_text_model_") + layer.replace(".", "_")
            kohya |= {f"{stem}.lora_down.weight": down.flip(0), f"{stem}.lora_up.weight": up * 0.5}
            kohya[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(peft, folder / "peft.safetensors")
    save_file(kohya, folder / "kohya.safetensors")


def draw(inputs: Path, out: Path, model: Path, only: str) -> int:
    """Draw all cases with the package on the path, and save the arrays."""
    from model_cases import AllCases

    import minisd

    warnings.simplefilter("ignore")
    place = out.with_suffix("")
    place.mkdir()
    write_loras(place, model)
    arrays: dict[str, np.ndarray] = {}
    for name, case in AllCases(inputs, place, model).collect().items():
        if not re.search(only, name):
            continue
        begin = time.perf_counter()
        try:
            results = list(flatten(case()))
            arrays |= {f"{name} / {index}": value for index, value in enumerate(results)}
        except Exception as error:
            arrays[f"{name} / error"] = np.array(f"{type(error).__name__}: {error}"[:300])
        if os.environ.get("SAME_PICTURES_TIMES"):
            print(f"{Path(minisd.__file__).parent.parent} {name} {time.perf_counter() - begin:.2f} s", file=sys.stderr)
    np.savez(out, **arrays)
    return 0


def flatten(result: Any) -> Any:
    """Yield the arrays of a picture, a tensor, a step, an array, or a sequence of these."""
    if hasattr(result, "x0"):
        yield np.array([result.index, result.t])
        yield from flatten([result.latents, result.x0, result.noise])
    elif hasattr(result, "detach"):
        yield result.detach().cpu().numpy()
    elif isinstance(result, (list, tuple)) or hasattr(result, "__next__"):
        for item in result:
            yield from flatten(item)
    else:
        yield np.asarray(result)
        if seed := getattr(result, "info", {}).get("seed"):
            yield np.array(seed)


if __name__ == "__main__":
    sys.exit(main())
