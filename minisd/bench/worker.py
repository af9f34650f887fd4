"""The worker process of one library: it reads requests as lines of JSON, computes, and answers with times.

All libraries get the same weights, inputs and number of threads. `minisd.bench.compare` starts
`python -m minisd.bench.worker minisd|diffusers|openvino|onnxruntime`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from minisd.features.fast import onednn_linear

PROMPT = "a fox in the snow"
GUIDANCE = 7.5
TIMESTEP = 481


class Library(Protocol):
    """What is measured of each library. Sizes are in pixels, latents are (n, 4, h/8, w/8)."""

    def load(self, folder: str, device: str, dtype: torch.dtype, compiled: bool | str) -> None: ...
    def text(self) -> Tensor:
        """Encode the empty prompt and the prompt to a context (2, 77, width)."""
        ...

    def step(self, latents: Tensor, context: Tensor) -> Tensor:
        """Predict with guidance: a batch of two through the UNet, and their combination."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images (n, 3, h, w)."""
        ...

    def picture(self, latents: Tensor, size: int, steps: int) -> Any:
        """Draw the prompt as PIL pictures, with DDIM from the given noises, and return the first."""
        ...


class Minisd:
    """This package."""

    def load(self, folder: str, device: str, dtype: torch.dtype, compiled: bool | str) -> None:
        from minisd import StableDiffusion

        self.sd = StableDiffusion.from_pretrained(folder, device=device, dtype=dtype)
        if compiled:
            self.sd.compile(**compile_options(compiled))

    def text(self) -> Tensor:
        return self.sd.encode_text(["", PROMPT])

    @torch.inference_mode()
    def step(self, latents: Tensor, context: Tensor) -> Tensor:
        return self.sd.predict(latents, TIMESTEP, context, GUIDANCE)

    def decode(self, latents: Tensor) -> Tensor:
        return self.sd.decode_to_tensor(latents)

    def picture(self, latents: Tensor, size: int, steps: int) -> Any:
        from minisd import Sampler

        *_, last = self.sd.denoise(
            [PROMPT] * len(latents), latents=latents, height=size, width=size, num_inference_steps=steps,
            guidance_scale=GUIDANCE, sampler=Sampler("ddim", "leading"),
        )  # fmt: skip
        return self.sd.decode(last.latents)[0]


class Diffusers:
    """diffusers, used as its documentation recommends."""

    def load(self, folder: str, device: str, dtype: torch.dtype, compiled: bool | str) -> None:
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        self.pipe: Any = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
        self.pipe.to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.scheduler = DDIMScheduler.from_config(
            self.pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1,
            timestep_spacing="leading",
        )  # fmt: skip
        if compiled:
            options = compile_options(compiled)
            self.pipe.unet = torch.compile(self.pipe.unet, fullgraph=True, **options)
            self.pipe.vae.decode = torch.compile(self.pipe.vae.decode, **options)

    @torch.no_grad()
    def text(self) -> Tensor:
        cond, uncond = self.pipe.encode_prompt(PROMPT, self.pipe.device, 1, True, "")
        return torch.cat([uncond, cond])

    @torch.no_grad()
    def step(self, latents: Tensor, context: Tensor) -> Tensor:
        both = torch.cat([latents, latents]).to(self.pipe.unet.dtype)
        uncond, cond = self.pipe.unet(both, TIMESTEP, context, return_dict=False)[0].chunk(2)
        return uncond + GUIDANCE * (cond - uncond)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]

    def picture(self, latents: Tensor, size: int, steps: int) -> Any:
        latents = latents.to(self.pipe.unet.dtype)
        return self.pipe(
            [PROMPT] * len(latents), latents=latents, height=size, width=size, num_inference_steps=steps,
            guidance_scale=GUIDANCE,
        ).images[0]  # fmt: skip


def find_library(name: str) -> Library:
    """Return a library by its name, or a peer."""
    if name in LIBRARIES:
        return LIBRARIES[name]()
    from minisd.bench.peers import PEERS, Peer

    if name not in PEERS:
        raise KeyError(name)
    return Peer(name)


LIBRARIES: dict[str, Callable[[], Library]] = {"minisd": Minisd, "diffusers": Diffusers}


def compile_options(compiled: bool | str) -> dict[str, Any]:
    """The arguments of `torch.compile`: a mode, if there is one."""
    return {"mode": compiled} if isinstance(compiled, str) else {}


def noise(size: int, device: str, count: int = 1) -> Tensor:
    """The initial noise (n, 4, size/8, size/8) of pictures, the same for both libraries."""
    return torch.randn(count, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(7)).to(device)


def peak_memory(device: str) -> int:
    """The peak memory of this process in bytes: allocated on the GPU, or resident (with mapped files) on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage includes the peak of the parent process
        return int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) * 1024
    if sys.platform == "win32":
        try:
            import psutil
        except ImportError as error:
            raise ImportError("on Windows, memory is measured with psutil; install it: pip install psutil") from error
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


def operator_seconds(call: Callable[[], object], device: str = "cpu") -> dict[str, Any]:
    """Run a function under torch's profiler.

    Returns:
        {"seconds": total, "operators": {name: seconds without the operators it calls}}; on a GPU, the operators'
        seconds are those of their kernels.
    """
    from torch.profiler import ProfilerActivity, profile

    gpu = device.startswith("cuda")
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        started = time.perf_counter()
        call()
        if gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    events = profiler.key_averages()
    own = {event.key: (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e6 for event in events}
    return {"seconds": seconds, "operators": own}


class Worker:
    """Answers requests {"do": method, …} of `minisd.bench.compare`; each method below returns an answer."""

    def __init__(self, library: str) -> None:
        self.library: Any = find_library(library)
        self.device = "cpu"

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        return getattr(self, request.pop("do"))(**request)  # type: ignore[no-any-return]

    def load(
        self, folder: str, device: str, dtype: str, threads: int, compiled: bool | str, graphs: str = ""
    ) -> dict[str, Any]:
        """Time loading the model, including a first, small call of the UNet. A peer finds its graphs in `graphs`."""
        self.library.graphs = Path(graphs)
        torch.set_num_threads(threads)
        torch.randn(256, 256) @ torch.randn(256, 256)  # start the threads, and CUDA
        self.device = device
        noise(8, device)
        started = time.perf_counter()
        self.library.load(folder, device, getattr(torch, dtype), compiled)
        self.context = self.library.text()
        if not compiled:
            self.library.step(noise(64, device), self.context)
            self._wait()
        return {"seconds": time.perf_counter() - started}

    def text(self) -> dict[str, Any]:
        return self._time(lambda: self.library.text())

    def step(self, size: int, attention: str | None = None) -> dict[str, Any]:
        """Time a step, if wanted with one of torch's attention kernels, such as "FLASH_ATTENTION"."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        latents, context = noise(size, self.device), self.context
        with nullcontext() if attention is None else sdpa_kernel(getattr(SDPBackend, attention)):
            return self._time(lambda: self.library.step(latents, context))

    def decode(self, size: int) -> dict[str, Any]:
        latents = noise(size, self.device)
        return self._time(lambda: self.library.decode(latents))

    def picture(self, size: int, steps: int, path: str, count: int = 1) -> dict[str, Any]:
        """Time `count` pictures drawn together, and save the first."""
        latents = noise(size, self.device, count)
        result: list[Any] = []
        answer = self._time(lambda: result.append(self.library.picture(latents, size, steps)))
        result[0].save(path)
        return answer

    def peak(self) -> dict[str, Any]:
        return {"bytes": peak_memory(self.device)}

    def ceiling(self, side: int) -> dict[str, Any]:
        """Time the product of two square matrices, 2·side³ FLOP: the ceiling of this machine.

        In float32 on a CPU torch has two libraries for it; the faster one counts.
        """
        dtype = self.context.dtype
        a, b = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
        ways: list[Callable[[], object]] = [lambda: a @ b]
        if self.device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
            ways.append(lambda: onednn_linear(a, b, None))
        return min((self._time(way) for way in ways), key=lambda answer: answer["seconds"])

    def profile(self, what: str, size: int) -> dict[str, Any]:
        """Profile one step ("step") or one decoding ("decode"), by operator."""
        latents, context = noise(size, self.device), self.context
        calls: dict[str, Callable[[], object]] = {
            "step": lambda: self.library.step(latents, context),
            "decode": lambda: self.library.decode(latents),
        }
        return operator_seconds(calls[what], self.device)

    def _time(self, call: Callable[[], object]) -> dict[str, Any]:
        if self.device.startswith("cuda"):  # by the GPU's own clock, without launch and synchronization overhead
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            return {"seconds": begin.elapsed_time(end) / 1000}
        started = time.perf_counter()
        call()
        return {"seconds": time.perf_counter() - started}

    def _wait(self) -> None:
        """Wait until the GPU is done."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


def main() -> None:
    worker, answers = Worker(sys.argv[1]), sys.stdout
    with redirect_stdout(sys.stderr):  # libraries may print; only answers go to stdout
        for line in sys.stdin:
            try:
                answer = worker.answer(json.loads(line))
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
