"""Faults while drawing: memory that runs out, threads that share a model, processes that share a folder."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Child, call, execute
from PIL import Image
from safetensors.torch import save_file

from minisd import StableDiffusion
from minisd.io.adapter_files import save_lora
from minisd.lora import LoRA, LowRank

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.fixture
def sd(small_model: Path) -> StableDiffusion:
    return StableDiffusion.from_pretrained(small_model, device="cpu")


TEXTS = (
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 9 TB"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("std::bad_alloc"),
)


@pytest.mark.parametrize("error", TEXTS, ids=lambda error: str(error)[:12])
def test_out_of_memory_becomes_advice(sd, error, monkeypatch):
    def full(*_: object) -> None:
        raise error

    uses: dict[str, tuple[Any, str, Callable[[], Any]]] = {
        "TextEncoder": (sd.text_encoder, "forward", lambda: sd("fox")),
        "UNet": (sd.unet, "forward", lambda: sd("fox")),
        "Autoencoder": (sd.autoencoder, "decode", lambda: sd("fox", num_inference_steps=1)),
        "Autoencoder ": (sd.autoencoder, "encode", lambda: sd.image_to_image("fox", PICTURE)),
    }
    for name, (part, method, act) in uses.items():
        with monkeypatch.context() as patch:
            patch.setattr(part, method, full)
            with pytest.raises(MemoryError, match=f"out of memory in the {name.strip()}; draw smaller .*offload=True"):
                act()
    assert sd("fox", seed=0, num_inference_steps=1).size == (32, 32)  # and the model can still be used


def test_other_errors_of_torch_stay_what_they_are(sd, monkeypatch):
    def wrong(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(sd.unet, "forward", wrong)
    with pytest.raises(RuntimeError, match="mat1"):
        sd("fox")


TIGHT = """
import resource, sys, torch
from minisd import StableDiffusion
from minisd.io.adapter_files import save_lora
from minisd.lora import LoRA, LowRank
from minisd.app import cli
sd = StableDiffusion.from_pretrained(sys.argv[1], device="cpu")
sd("fox", num_inference_steps=1)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 150 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    sd(["fox"] * 8, height=512, width=512, num_inference_steps=1)
except MemoryError as error:
    print("told:", error)
print("size", sd("fox", num_inference_steps=1).size)
code = cli.main(["generate", "fox", "-n", "8", "--batch", "8", "--width", "512", "--height", "512", "--steps", "1",
                 "--model", sys.argv[1]])
print("code", code)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits the address space, as Linux can")
def test_a_process_short_of_memory_tells_and_goes_on(small_model, tmp_path):
    done = call(execute, TIGHT, str(small_model), cwd=tmp_path)
    assert done.code == 0, done.err[-2000:]
    told, size, code = done.out.splitlines()
    assert told.startswith("told: out of memory in the ") and "tile=True" in told
    assert (size, code) == ("size (32, 32)", "code 1")
    assert "error: out of memory; try a smaller --batch" in done.err and "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_offloaded_parts_at_home(small_model, monkeypatch):
    """The device is the CPU here as well, but the parts are copied to it and put back all the same.

    Both pictures are drawn from copies: on some CPUs rounding depends on where in memory the weights begin.
    """
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    home = sd.unet.conv_in.weight
    sd.offload = torch.device("cpu", 0)
    expected = sd("fox", seed=0)
    forward = sd.unet.forward
    monkeypatch.setattr(sd.unet, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        sd("fox", seed=0)
    assert sd.unet.conv_in.weight.data_ptr() == home.data_ptr()
    monkeypatch.setattr(sd.unet, "forward", forward)
    assert np.array_equal(np.asarray(sd("fox", seed=0)), np.asarray(expected))


def test_a_model_is_not_changed_while_another_thread_draws(small_model, tmp_path):
    """Every method that changes it is refused meanwhile, and the picture is the one drawn alone."""
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    layer = sd.unet.conv_in
    update = LowRank(layer, 2)
    torch.nn.init.ones_(update.lora_B)
    save_lora(LoRA({"unet.conv_in": update}), tmp_path / "style.safetensors")
    save_file({"<new>": torch.ones(1, 16)}, tmp_path / "word.safetensors")
    sd.load_lora(tmp_path / "style.safetensors", "first", weight=0.0)
    settings: dict[str, Any] = {"seed": 3, "num_inference_steps": 3}
    alone = sd("fox", **settings).tobytes()
    changes: dict[str, Callable[[], object]] = {
        "load": lambda: sd.load_lora(tmp_path / "style.safetensors", "second"),
        "weights": lambda: sd.set_adapters({"first": 1.0}),
        "fuse": sd.fuse_lora,
        "unload": sd.unload_lora,
        "word": lambda: sd.load_textual_inversion(tmp_path / "word.safetensors"),
        "compile": sd.compile,
    }
    refused = []

    def change() -> None:
        for name, attempt in changes.items():
            try:
                attempt()
            except RuntimeError as error:
                assert "another thread is drawing" in str(error)
                refused.append(name)

    for step in sd.denoise("fox", **settings):
        latents = step.latents
        thread = threading.Thread(target=change)
        thread.start()
        thread.join()
    assert refused == [*changes] * 3 and sd.decode(latents)[0].tobytes() == alone
    for name in ("load", "weights", "fuse", "unload", "word"):
        changes[name]()
    assert sd("fox", **settings).tobytes() == alone  # the word is not in the prompt, the LoRAs are gone
    # a copy's weights may lie at other alignments, where kernels add in another order
    copied = np.asarray(copy.deepcopy(sd)("fox", **settings), dtype=np.int16).ravel()
    assert np.abs(copied - np.frombuffer(alone, np.uint8)).max() <= 1


def test_a_drawing_waits_for_a_change_in_another_thread(small_model):
    sd, order = StableDiffusion.from_pretrained(small_model, device="cpu"), []

    def draw() -> None:
        sd("fox", seed=1, num_inference_steps=1)
        order.append("drawn")

    with sd.usage.changing():
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join(0.5)
        order.append("changed")
    thread.join()
    assert order == ["changed", "drawn"]


def test_threads_that_share_a_model_draw_what_they_draw_alone(sd):
    mask = Image.fromarray(np.pad(np.full((16, 16), 255, np.uint8), 8))
    jobs: list[Callable[[], Image.Image]] = [
        lambda seed=seed, sampler=sampler: sd("red fox", seed=seed, sampler=sampler)  # type: ignore[misc]
        for seed, sampler in enumerate(("ddpm", "ddim", "pndm", "euler", "euler_a", "heun", "dpmpp_2m"))
    ]
    jobs += [
        lambda: sd.image_to_image("snow", PICTURE, seed=7),
        lambda: sd.inpaint("snow", PICTURE, mask, seed=8),
        lambda: sd("fox", seed=9, height=48, width=24),
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = [job().tobytes() for job in jobs]
        together: dict[tuple[int, int], bytes] = {}
        start = threading.Barrier(len(jobs))

        def work(number: int) -> None:
            start.wait()
            for turn in range(3):
                together[number, turn] = jobs[number]().tobytes()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert len(set(alone)) == len(jobs)
    assert together == {(number, turn): alone[number] for number in range(len(jobs)) for turn in range(3)}


WRITER = """
import sys
from pathlib import Path
from PIL import Image
from safetensors.torch import save_file
from minisd.pipeline.metadata import save_png
Path(f"ready-{sys.argv[1]}").touch()
while not Path("go").exists():
    pass
for number in range(40):
    print(save_png(Image.new("RGB", (8, 8), (int(sys.argv[1]), number, 0)), Path("out/fox.png"), f"{sys.argv[1]} {number}"))
"""  # noqa: E501


def test_processes_that_write_the_same_name_lose_no_picture(tmp_path):
    writers = [Child(execute, WRITER, str(one), cwd=tmp_path) for one in range(3)]
    for one in range(3):
        while not (tmp_path / f"ready-{one}").exists():
            assert writers[one].poll() is None
            time.sleep(0.01)
    (tmp_path / "go").touch()
    done = [writer.finish() for writer in writers]
    assert [one.code for one in done] == [0, 0, 0], [one.err for one in done]
    names = [name for one in done for name in one.out.splitlines()]
    files = list((tmp_path / "out").iterdir())
    assert sorted(names) == sorted(f"out/{path.name}" for path in files) and len(set(names)) == 120
    colors = {Image.open(path).getpixel((0, 0)) for path in files}
    assert colors == {(one, number, 0) for one in range(3) for number in range(40)}
    assert {path.name for path in files} == {"fox.png", *(f"fox-{number}.png" for number in range(2, 121))}
