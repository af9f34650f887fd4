"""A GPU that computes nothing: full-size models run on it in seconds, and a tensor left on the CPU is an error.

Three things slip through: weights of convolutions, single numbers (as on CUDA), and float16 mixed with float32.
It rests on private names of torch, all of them in this file. Registering the made-up device cannot be undone, so
`test_fake_gpu.py` runs this file as a program of its own: it prints, as JSON, how every scenario ended.
"""

from __future__ import annotations

import json
import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import minisd.unet
from minisd import SD15, SD21, TINY, Autoencoder, StableDiffusion, TextEncoder, Tokenizer, UNet, record_attention
from minisd.config import ModelConfig
from minisd.features.adapters import LoRA, LowRank, layers_of
from minisd.features.more_samplers import Sampler
from minisd.samplers import SAMPLERS

GPU = "fakegpu:0"
# Where the sampling loop is asked, and not the networks: as few operators as there can be.
FEW = replace(
    TINY,
    text_encoder=replace(TINY.text_encoder, num_hidden_layers=1),
    autoencoder=replace(TINY.autoencoder, block_out_channels=(16, 16, 16, 16)),
    unet=replace(
        TINY.unet,
        block_out_channels=(64,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=(2,),
    ),
)


class FakeGPU(fake_tensor.FakeTensorMode):
    """Tensors with a shape, a dtype and a device, and no numbers: who asks for one is told True, or `number`."""

    number = 0
    avoid_device_init = property(lambda self: True)  # type: ignore[assignment]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else self.number
        return super().__torch_dispatch__(function, types, args, kwargs)


def register() -> FakeGPU:
    """Make the device known to torch, once per process; use the result as `with mode:`."""
    _setup_privateuseone_for_python_backend("fakegpu")
    cast(Any, fake_tensor).CONSTANT_NUMEL_LIMIT = 0  # or moving a tensor of one element fails in inference mode
    return FakeGPU()


def on_device(network: nn.Module, mode: FakeGPU, device: str, dtype: torch.dtype = torch.float16) -> Any:
    """Give a network from the meta device weights on the fake GPU, or beside it on the (fake) CPU."""
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    with mode:
        network.load_state_dict(
            {key: torch.empty(shape, dtype=dtype, device=device) for key, shape in shapes.items()}, assign=True
        )
    return network.eval().requires_grad_(False)


def build(config: ModelConfig, mode: FakeGPU, offload: bool = False) -> StableDiffusion:
    """A whole model of full size on the fake GPU, or with `offload` on the CPU beside it."""
    with torch.device("meta"):
        parts = TextEncoder(config.text_encoder), UNet(config.unet), Autoencoder(config.autoencoder)
    placed = [on_device(part, mode, "cpu" if offload else GPU) for part in parts]
    return StableDiffusion(config, Tokenizer.from_pretrained(), *placed, offload=torch.device(GPU) if offload else None)


class Meter(TorchDispatchMode):
    """Counts the bytes on the fake GPU of every tensor that an operation returns, for as long as the tensor lives.

    What shares memory is counted once. `peak` is the largest sum so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: Counter[int] = Counter()
        self.bytes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.device.type == "fakegpu":
                self.note(tensor)
        return result

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self.alive[key]:
            self.bytes[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
        self.alive[key] += 1
        weakref.finalize(tensor, self.forget, key)

    def forget(self, key: int) -> None:
        self.alive[key] -= 1
        if not self.alive[key]:
            self.now -= self.bytes[key]


def offloaded(sd: StableDiffusion) -> dict[str, Any]:
    """One picture of 512×512 in two guided steps: where the weights were while each part worked, and the peak there.

    The peak is that of the part's weights and of everything it computes, in bytes.
    """
    parts = {"text encoder": sd.text_encoder, "UNet": sd.unet, "autoencoder": sd.autoencoder}
    sizes = {name: sum(p.numel() * p.element_size() for p in part.parameters()) for name, part in parts.items()}
    placed: dict[str, list[str]] = {}
    peaks: dict[str, int] = {}
    with Meter() as meter:
        for name, method in (("text encoder", "forward"), ("UNet", "forward"), ("autoencoder", "decode")):
            own = getattr(parts[name], method)

            def watched(*args: Any, name: str = name, own: Any = own) -> Any:
                placed[name] = [n for n, part in parts.items() if next(part.parameters()).device.type == "fakegpu"]
                meter.peak = before = meter.now
                result = own(*args)
                peaks[name] = max(peaks.get(name, 0), sizes[name] + meter.peak - before)
                return result

            setattr(parts[name], method, watched)
        draw(sd, prompts=["a fox in the snow"], size=(512, 512), count=2)
    after = [name for name, part in parts.items() if next(part.parameters()).device.type == "fakegpu"]
    return {"placed": placed, "peaks": peaks, "weights": sizes, "after": after}


def offloaded_with_lora(sd: StableDiffusion) -> list[int]:
    """A picture while a LoRA, which stays on the CPU, acts on every layer of the UNet: its layers, and its calls."""
    layers = layers_of({"unet": sd.unet})
    lora = LoRA({name: LowRank(layer, 4) for name, layer in layers.items()})
    lora.attach(layers)
    calls: list[str] = []
    for update in lora.updates:
        for name in ("lora_A", "lora_B"):
            on_cpu = torch.empty(getattr(update, name).shape, dtype=torch.float16)
            setattr(update, name, nn.Parameter(on_cpu, requires_grad=False))
        update.register_forward_hook(lambda module, inputs, output: calls.append(output.device.type))
    for _ in sd.denoise("a fox in the snow", num_inference_steps=1, seed=0, sampler="ddim"):
        pass
    return [len(layers), calls.count("fakegpu")]


class Waits(TorchDispatchMode):
    """Records the operators that would wait for a GPU: numbers that are read, and copies outside its queue."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name, places = function.overloadpacket.__name__, [x.device.type for x in args if isinstance(x, Tensor)]
        given = {each.name: value for each, value in zip(function._schema.arguments, args, strict=False)}
        reads = "fakegpu" in places and name in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal")
        places += [result.device.type] if isinstance(result, Tensor) else []
        copies = {"cpu", "fakegpu"} <= {*places} and name in ("to", "_to_copy", "copy_")
        if reads or (copies and not (given | (kwargs or {})).get("non_blocking")):
            self.found.append(name)
        return result


def waits_between_calls(sd: StableDiffusion, prompt: str = "a fox", *inputs: Any, **options: Any) -> list[str]:
    """The operators that would wait for the GPU from the first call of the UNet to the last."""
    with Waits() as waits:
        reached: list[int] = []
        handle = sd.unet.conv_in.register_forward_pre_hook(lambda module, inputs: reached.append(len(waits.found)))
        try:
            for _ in sd.denoise(prompt, *inputs, seed=0, **{"num_inference_steps": 4, **options}):
                pass
        finally:
            handle.remove()
    assert len(reached) >= 4
    return waits.found[reached[0] : reached[-1]]


def waits(sd: StableDiffusion, tiny: StableDiffusion) -> dict[str, list[str]]:
    """The waits inside the sampling loop, by what is drawn; the last one is there to be found.

    `sd` has the fewest blocks: the loop is what differs. `tiny` has a UNet of the common depth, some of it reused.
    """
    image, mask = torch.zeros(1, 3, 256, 256), torch.ones(1, 1, 256, 256)
    found = {name: waits_between_calls(sd, sampler=name) for name in Sampler.functions}
    found |= {
        "turbo": waits_between_calls(sd, preset="turbo"),
        "scales": waits_between_calls(sd, ["a fox", "a cat"], guidance_scale=[3, 7.5], guidance_rescale=0.5),
        "feature reuse": waits_between_calls(tiny, num_inference_steps=8, feature_reuse=(2, 2)),
        "prompt editing": waits_between_calls(sd, "a [fox:cat:0.5] AND snow :0.5"),
        "inpainting": waits_between_calls(sd, "a fox", image, mask, sampler="ddpm"),
        "callback": waits_between_calls(sd, callback=lambda index, t, latents: latents / 2),
        "planted": waits_between_calls(sd, callback=lambda index, t, latents: print(end=str(latents.sum().item())[:0])),
    }
    return found


def told(x: Tensor) -> list[Any]:
    return [list(x.shape), str(x.dtype).removeprefix("torch."), x.device.type]


PROMPTS = ["a fox in the snow", "a cat"]


def draw(
    sd: StableDiffusion,
    sampler: str = "euler_a",
    prompts: list[str] = PROMPTS,
    size: tuple[int, int] = (448, 512),
    count: int = 1,
) -> list[Any]:
    """Pictures from words to pixels in so many guided steps; returns what they are and where."""
    width, height = size
    settings: dict[str, Any] = {"num_inference_steps": count, "seed": 0, "sampler": sampler}
    *_, step = sd.denoise(prompts, height=height, width=width, **settings)
    return told(sd.decode_to_tensor(step.latents))


def redraw(sd: StableDiffusion) -> list[Any]:
    """A picture from a picture, the same."""
    image = torch.zeros(1, 3, 512, 512)
    *_, step = sd.denoise("a cat", image, strength=0.7, num_inference_steps=2, seed=0, sampler="ddim")
    return told(sd.decode_to_tensor(step.latents))


def steps(sd: StableDiffusion) -> list[list[Any]]:
    """What every step of the generator yields."""
    taken = list(sd.denoise(["a fox", "a cat"], num_inference_steps=2, seed=0, sampler="ddpm"))
    return [told(x) for step in taken for x in (step.latents, step.x0, step.noise)]


def record(sd: StableDiffusion) -> list[str]:
    """The explicit softmax, with its causal mask, on the device too."""
    ids = sd.tokenizer(["a fox"]).to(GPU)
    latents, t = torch.empty(1, 4, 64, 64, dtype=torch.float16, device=GPU), torch.tensor(1.0, device=GPU)
    with record_attention(sd.text_encoder) as of_text, record_attention(sd.unet) as of_unet:
        sd.unet(latents, t, sd.text_encoder(ids))
    return [record.weights.device.type for record in (*of_text, *of_unet)]


@contextmanager
def weight_on_cpu(network: nn.Module, key: str) -> Iterator[None]:
    """For the length of this block, one weight is a (fake) tensor on the CPU."""
    place, name = key.rsplit(".", 1)
    module = network.get_submodule(place)
    right = getattr(module, name)
    setattr(module, name, nn.Parameter(torch.empty(right.shape, dtype=right.dtype), requires_grad=False))
    try:
        yield
    finally:
        setattr(module, name, right)


def scenarios(mode: FakeGPU) -> Iterator[tuple[str, Callable[[], Any]]]:
    sd, sd2, few = build(SD15, mode), build(SD21, mode), build(FEW, mode)
    yield "SD 1.5", lambda: draw(sd)
    yield "SD 2.1", lambda: draw(sd2)
    for sampler in SAMPLERS:
        yield sampler, partial(draw, few, sampler, count=2)
    yield "redraw", lambda: redraw(sd)
    yield "steps", lambda: steps(few)
    yield "record", lambda: record(sd)
    yield "waits", lambda: waits(few, build(TINY, mode))

    def planted(plant: Any) -> Any:
        with plant:
            return draw(sd)

    yield "offload", lambda: offloaded(build(SD15, mode, offload=True))
    yield "offload with LoRA", lambda: offloaded_with_lora(build(SD15, mode, offload=True))

    text, unet, autoencoder = sd.text_encoder, sd.unet, sd.autoencoder
    position = "text_model.embeddings.position_embedding.weight"
    yield "plant: position embedding", lambda: planted(weight_on_cpu(text, position))
    yield "plant: UNet weight", lambda: planted(weight_on_cpu(unet, "time_embedding.linear_1.weight"))
    yield "plant: UNet norm", lambda: planted(weight_on_cpu(unet, "up_blocks.3.resnets.2.norm2.weight"))
    yield "plant: decoder norm", lambda: planted(weight_on_cpu(autoencoder, "decoder.conv_norm_out.weight"))
    right = minisd.unet.timestep_embedding
    forgot = mock.patch.object(minisd.unet, "timestep_embedding", lambda t, dim: right(t.cpu(), dim))
    yield "plant: frequencies", lambda: planted(forgot)
    on_cpu = mock.patch.object(sd, "encode_text", lambda texts, *_: torch.zeros(len(texts), 77, 768).half())
    yield "plant: context", lambda: planted(on_cpu)


def main() -> None:
    mode, results = register(), {}
    for name, scenario in scenarios(mode):
        result, where = None, ""
        try:
            with mode:
                result, outcome = scenario(), "ran through"
        except Exception as error:
            outcome = type(error).__name__
            where = "".join(traceback.format_exception(error))[-1500:]
        results[name] = {"outcome": outcome, "result": result, "error": where}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
