"""A hunt: small valid files are damaged by seed and given to the public loaders; each must load whole or be refused.

python tests/hunt_files.py [--count 6000] [--seed 0]

A file is cut, flipped, spliced or edited, exchanged for another one, or a pickle that runs
code is put into it. Every case runs in one worker process with limited memory and time, so a crash or a hang is caught
as well. A case ends

- whole: loaded, and equal to the file before the damage;
- other: loaded, with the same names and shapes, but other numbers or settings (a flipped bit in a weight, another
  digit in a configuration), which nothing but a digest could tell;
- refused: CheckpointError, another ValueError, or OSError, with a message;
- FAILED: anything else, such as code that was executed, printed with its seed. `--seed SEED --count 1` repeats it.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import pickletools
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

MEMORY = 2**30  # beyond what the worker has when it starts
SECONDS = 20  # of its own CPU time, for one case

NO_WEIGHTS = {
    "empty": b"",
    "web page": b"\n<!DOCTYPE html><html><body>Please log in</body></html>",
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167540\n",
    "git-annex": b"/annex/objects/SHA256E-s3438167540--4d7a.safetensors\n",
}
JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 10**9, 2**63, 10**400, float("nan"), float("inf"), "", "x" * 5000, "../../etc/passwd", [],
    {}, [[]], [1] * 1000, {"a": {"a": {}}}, "\x1b[2J", "NaN",
)  # fmt: skip


def damage(
    data: bytes, name: str, rng: random.Random, strange: Sequence[bytes] = (), hostile: Sequence[bytes] = ()
) -> bytes:
    """One change to a file: by bytes, by the structure that its name promises, or for another file altogether.

    strange: files to take its place. hostile: pickles to put into it, if it is one.
    """
    if not data or (strange and rng.random() < 0.05):
        return rng.choice(strange) if strange else data
    if hostile and name.endswith((".ckpt", ".pt", ".bin")) and rng.random() < 0.5:
        return infect(data, rng.choice(hostile), rng)
    changes: list[Callable[[bytes, random.Random], bytes]] = [cut, flip, flip, splice, insert, fill]
    if name.endswith(".json"):
        changes += [edit_json] * 6
    if name.endswith(".safetensors"):
        changes += [edit_header] * 6
    if name.endswith((".ckpt", ".pt", ".bin")):
        changes += [edit_pickle] * 6
    return rng.choice(changes)(data, rng)


def place(data: bytes, rng: random.Random) -> int:
    """Somewhere in the data; half of the time near the beginning, where the structure is."""
    return rng.randrange(min(len(data), rng.choice((64, 2000, len(data), len(data)))))


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((place(data, rng), len(data) - 1 - rng.randrange(min(len(data), 100))))]


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20))):
        changed[place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def splice(data: bytes, rng: random.Random) -> bytes:
    """A piece of the file is copied over another place, or taken out."""
    start, end = sorted((place(data, rng), place(data, rng)))
    at = place(data, rng)
    return data[:at] + data[start:end] + data[rng.choice((at, at + end - start)) :]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = place(data, rng)
    return data[:at] + rng.randbytes(rng.choice((1, 4, 300))) + data[at:]


def fill(data: bytes, rng: random.Random) -> bytes:
    start, end = sorted((place(data, rng), place(data, rng)))
    return data[:start] + bytes([rng.choice((0, 255, 32))]) * (end - start) + data[end:]


def edit_json(data: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(data)
    except ValueError:
        return flip(data, rng)
    return json.dumps(edited(value, rng)).encode()


def edited(value: Any, rng: random.Random) -> Any:
    """A JSON value with one thing in it replaced, removed, renamed or doubled."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(JUNK)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        middle = rng.choice(([], [edited(value[at], rng)], [value[at]] * 2))
        return [*value[:at], *middle, *value[at + 1 :]]
    key = rng.choice(list(value))
    rest = {name: item for name, item in value.items() if name != key}
    if rng.random() < 0.25:
        return rest
    if rng.random() < 0.15:
        return rest | {rng.choice(("x", "", "../x", "_class_name")): value[key]}
    return value | {key: edited(value[key], rng)}


def edit_header(data: bytes, rng: random.Random) -> bytes:
    """Another header before the same numbers: its JSON, a dtype, an offset, or its length."""
    length = int.from_bytes(data[:8], "little")
    try:
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        header = {key: item for key, item in header.items() if isinstance(item, dict)}
        key = rng.choice(list(header))
    except (ValueError, AttributeError, IndexError):  # damaged before
        return flip(data, rng)
    kind = rng.randrange(5)
    if kind == 0:
        header = edited(header, rng)
    elif kind == 1 and "dtype" in header[key]:
        header[key]["dtype"] = rng.choice(("F16", "F64", "I32", "BOOL", "F8_E4M3", "F4", "C64", "X", "f32"))
    elif kind == 2 and "data_offsets" in header[key]:
        header[key]["data_offsets"] = [0, rng.choice((-4, -1, 1, 4, 2**40, -(2**40)))]
    elif kind == 3 and "shape" in header[key]:
        header[key]["shape"] = [rng.choice((0, -1, 1, 2**31, 2**62)), 2]
    text = json.dumps(header).encode()
    length = len(text) if kind < 4 else rng.choice((0, 1, len(text) - 1, len(text) + 8, 2**27, 2**63, 2**64 - 1))
    return length.to_bytes(8, "little") + text + body


def members_of(data: bytes) -> dict[str, bytes]:
    """What a zip archive holds; nothing where it is none, or one that was damaged before."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError, OSError):
        return {}


def infect(data: bytes, program: bytes, rng: random.Random) -> bytes:
    """A hostile pickle in the middle of the first pickle of a checkpoint, or in its place, or before the file."""
    members = members_of(data)
    name = next((name for name in members if name.endswith("data.pkl")), None)
    where = rng.randrange(4)
    if where == 0:
        return program + data
    if name is None:
        return with_program(data, program, rng)
    members[name] = program if where == 1 else with_program(members[name], program, rng)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for each, content in members.items():
            archive.writestr(each, content)
    return stream.getvalue()


def with_program(pickle: bytes, program: bytes, rng: random.Random) -> bytes:
    """A pickle that carries another one out between two of its instructions, and goes on as before."""
    try:
        places = [place for _, _, place in pickletools.genops(pickle) if place]
    except Exception:  # damaged before
        return program + pickle
    at = rng.choice(places)
    inner = program[2:-1] if program.startswith(b"\x80") else program[:-1]
    return pickle[:at] + inner + b"0" + pickle[at:]


def edit_pickle(data: bytes, rng: random.Random) -> bytes:
    """Damage inside a zip archive, with its sums computed anew, so that it gets as far as the pickle."""
    members = members_of(data)
    if not members:
        return rng.choice((flip, splice, insert))(data, rng)
    name = rng.choice([name for name in members if name.endswith("data.pkl")] * 4 + list(members))
    if members[name]:
        members[name] = rng.choice((cut, flip, flip, splice, insert, fill))(members[name], rng)
    if rng.random() < 0.1:
        del members[rng.choice(list(members))]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", rng.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED,))) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


class Hunt:
    """The valid files, in a folder, and how each kind is loaded."""

    def __init__(self, folder: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        from minisd import TINY, Autoencoder, StableDiffusion, TextEncoder, Tokenizer, UNet
        from minisd.io.key_names import single_file_sources

        torch.set_num_threads(1)
        torch.manual_seed(0)
        full = Tokenizer.from_pretrained()
        merges = list(full.ranks)[:8]
        tokens = [*full._symbols, *(symbol + "</w>" for symbol in full._symbols), *map("".join, merges)]
        tokens += ["<|startoftext|>", "<|endoftext|>"]
        tokenizer = Tokenizer({token: i for i, token in enumerate(tokens)}, merges)
        text = replace(
            TINY.text_encoder,
            vocab_size=len(tokens),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        vae = replace(TINY.autoencoder, block_out_channels=(8, 8, 8, 8), norm_num_groups=4, sample_size=32)
        unet = replace(
            TINY.unet, sample_size=4, cross_attention_dim=8, block_out_channels=(8, 8, 8), norm_num_groups=4,
            attention_head_dim=2,
        )  # fmt: skip
        self.config = replace(TINY, text_encoder=text, autoencoder=vae, unet=unet)
        self.model = StableDiffusion(self.config, tokenizer, TextEncoder(text), UNet(unet), Autoencoder(vae))
        self.model.save_pretrained(folder / "model")
        weights = {
            f"{part}.{key}": value.contiguous()
            for part in ("text_encoder", "vae", "unet")
            for path in (folder / "model" / part).glob("*.safetensors")
            for key, value in load_file(path).items()
        }
        single = {single_file_sources(*key.split(".", 1), self.config)[0].key: v for key, v in weights.items()}
        save_file(single, folder / "single.safetensors")
        torch.save({"state_dict": single, "global_step": 3}, folder / "single.ckpt")
        torch.save(single, folder / "old.ckpt", _use_new_zipfile_serialization=False)
        layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
        lora = {f"{layer}.lora_down.weight": torch.randn(2, 8), f"{layer}.lora_up.weight": torch.randn(8, 2)}
        lora[f"{layer}.alpha"] = torch.tensor(1.0)
        save_file(lora, folder / "lora.safetensors", {"lora_adapter_metadata": '{"unet.alpha_pattern": {"to_q": 3}}'})
        torch.save(lora, folder / "lora.pt")
        save_file({"<word>": torch.randn(2, 8)}, folder / "word.safetensors")
        torch.save({"string_to_param": {"*": torch.randn(2, 8)}, "name": "word"}, folder / "word.pt")
        self._write_shards(folder, weights)
        self._write_pictures(folder)
        self.folder = folder
        self.cases = self._cases()
        self.canary = folder / "ran"
        self._gather_strangers()
        self.wanted: dict[str, Any] = {}

    def _write_shards(self, folder: Path, weights: Mapping[str, Any]) -> None:
        """The same model with its UNet in two files and an index."""
        from safetensors.torch import save_file

        shutil.copytree(folder / "model", folder / "shards")
        (folder / "shards/unet/diffusion_pytorch_model.safetensors").unlink()
        unet = [(key.removeprefix("unet."), value) for key, value in weights.items() if key.startswith("unet.")]
        index = {}
        for number, half in ((1, unet[::2]), (2, unet[1::2])):
            name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
            save_file(dict(half), folder / "shards/unet" / name)
            index |= {key: name for key, _ in half}
        path = folder / "shards/unet/diffusion_pytorch_model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": index}))

    def _write_pictures(self, folder: Path) -> None:
        from PIL import Image, PngImagePlugin

        image = Image.effect_noise((24, 16), 80).convert("RGB")
        info, exif = PngImagePlugin.PngInfo(), Image.Exif()
        info.add_text("parameters", "a fox\nSteps: 20, Seed: 7", zip=True)
        exif[274] = 6
        for name, options in {
            "a.png": {"pnginfo": info}, "b.jpg": {"exif": exif}, "c.webp": {"exif": exif}, "d.gif": {}, "e.bmp": {},
            "f.tif": {"compression": "tiff_lzw"},
        }.items():  # fmt: skip
            image.save(folder / name, **options)
        image.quantize(5).save(folder / "g.png")
        Image.new("I;16", (9, 9), 40_000).save(folder / "h.png")
        image.convert("RGBA").save(folder / "i.png")

    def _gather_strangers(self) -> None:
        """What is put in the place of a file, and into pickles."""
        from hostile_pickles import REFUSED, programs

        self.hostile = [*programs(self.canary).values()] * 3 + [each for each in REFUSED.values() if len(each) < 10_000]
        self.strange = [*NO_WEIGHTS.values(), *self.hostile]
        self.strange += [path.read_bytes() for path in sorted({self.folder / name for name, _ in self.cases})]

    def _cases(self) -> list[tuple[str, Callable[[Path], Any]]]:
        from minisd.io import checkpoint
        from minisd.io.adapter_files import read_lora, read_textual_inversion
        from minisd.io.pictures import read_picture
        from minisd.io.tokenizer_files import read_tokenizer
        from minisd.pipeline.metadata import read_parameters

        def model(path: Path) -> Any:
            loaded = checkpoint.load(path, config=self.config) if path.is_file() else checkpoint.load(path)
            parts = loaded.text_encoder, loaded.autoencoder, loaded.unet
            states = [state(part) for part in parts]
            return states, loaded.config, loaded.defaults, loaded.tokenizer.ranks, loaded.tokenizer.pad_token

        def lora(path: Path) -> Any:
            parts = {"unet": self.model.unet, "text_encoder": self.model.text_encoder}
            found = read_lora(path, parts)
            return found.names, state(found), [update.scale for _, update in found.items()]

        def picture(path: Path) -> Any:
            read_parameters(path)
            return read_picture(path, 16, 16).tobytes()

        def tokens(path: Path) -> Any:
            return read_tokenizer(path.parent).vocabulary

        inside = {"model": [], "shards": []}
        for name, files in inside.items():
            paths = sorted((self.folder / name).rglob("*.*"))
            files += [(str(path.relative_to(self.folder)), partial(_above, model, name)) for path in paths]
        shards = [case for case in inside["shards"] if "shards/unet" in case[0]]
        adapters = [(name, lora) for name in ("lora.safetensors", "lora.pt")]
        adapters += [(name, read_textual_inversion) for name in ("word.safetensors", "word.pt")]
        pictures = [(path.name, picture) for path in sorted(self.folder.glob("?.*"))]
        vocabulary = [(f"model/tokenizer/{name}", tokens) for name in ("vocab.json", "merges.txt")]
        singles = [(name, model) for name in ("single.safetensors", "single.ckpt", "old.ckpt")]
        return inside["model"] * 2 + shards * 2 + adapters * 8 + pictures * 4 + vocabulary * 2 + singles

    def run(self, seed: int) -> tuple[str, str]:
        """The outcome of one seed, and what was done."""
        rng = random.Random(seed)
        name, load = rng.choice(self.cases)
        path = self.folder / name
        before = path.read_bytes()
        wanted = self.wanted[name] if name in self.wanted else self.wanted.setdefault(name, load(path))
        after = before
        for _ in range(rng.choice((1, 1, 1, 2))):
            after = damage(after, name, rng, self.strange, self.hostile)
        try:
            path.write_bytes(after)
            try:
                found = load(path)
            except (ValueError, OSError) as error:
                ran = self.canary.exists()
                return "FAILED executed" if ran else "refused", f"{name}: {type(error).__name__}: {error}"
            if self.canary.exists():
                return "FAILED executed", name
            if same(wanted, found):
                return "whole", name
            return ("other" if outline(wanted) == outline(found) or rough(name) else "FAILED shape"), name
        except Exception as error:
            return f"FAILED {type(error).__name__}", f"{name}: {error}"
        finally:
            self.canary.unlink(missing_ok=True)
            path.unlink()  # a new file: loaded weights are maps of the old one
            path.write_bytes(before)


def _above(load: Callable[[Path], Any], top: str, path: Path) -> Any:
    return load(next(parent for parent in path.parents if parent.name == top))


def state(module: Any) -> dict[str, Any]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(one: Any, two: Any) -> bool:
    import torch

    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.shape == two.shape and bool(one.equal(two))
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


def outline(value: Any) -> Any:
    """Names and shapes, without the numbers and settings."""
    import torch

    if isinstance(value, torch.Tensor):
        shape = tuple(value.shape)
        return shape[:2] if shape[2:] == (1, 1) else shape, value.dtype  # a layer may be linear or a 1×1 convolution
    if isinstance(value, dict):
        return {key: outline(item) for key, item in value.items() if not isinstance(key, tuple)}
    if isinstance(value, (list, tuple)):
        return [outline(item) for item in value]
    return type(value)


def rough(name: str) -> bool:
    """Files whose outline may differ: an adapter of fewer vectors or layers, a vocabulary, is valid as it is."""
    return name.startswith(("word", "lora")) or "tokenizer" in name


def worker(connection: Any) -> None:
    """Answer seeds with outcomes, until the other end is closed."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        hunt = Hunt(Path(folder))
        hunt.run(0)
        size = int(re.findall(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        connection.send(len(hunt.cases))
        while True:
            try:
                seed = connection.recv()
            except EOFError:
                return
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its own time: others may be using the machine
            outcome = hunt.run(seed)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send(outcome)


def hunt(count: int, seed: int = 0, show: bool = False) -> Counter[str]:
    """Run `count` seeds from `seed` on, print what failed, and return how many ended in which way."""
    context = multiprocessing.get_context("spawn")
    outcomes: Counter[str] = Counter()
    process = ours = None
    try:
        for each in range(seed, seed + count):
            if process is None or ours is None:
                ours, theirs = context.Pipe()
                process = context.Process(target=worker, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                ours.recv()
            try:
                ours.send(each)
                outcome, detail = ours.recv()
            except (EOFError, OSError):
                process.join()
                outcome, detail = "FAILED crash", f"the worker ended with {process.exitcode}"
                process = None
            outcomes[outcome] += 1
            if show or outcome.startswith("FAILED"):
                print(f"seed {each}: {outcome}: {detail[:300]}", flush=True)
    finally:
        if ours is not None and process is not None:
            ours.close()
            process.join(10)
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print every case")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = hunt(options.count, options.seed, options.show)
    for name, number in sorted(found.items()):
        print(f"{number:6} {name}")
    sys.exit(any(name.startswith("FAILED") for name in found))
