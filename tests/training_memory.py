"""Counts the memory of one training step of a full-size model on the fake GPU, mixed precision included.

Prints the peak in bytes: weights, activations, gradients, the state of the optimizer. What rests on the CPU in training
(the autoencoder; the text encoder too where it is not trained) is not there. Attention is counted as plain products,
with all its scores; fused kernels take less.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fake_gpu import GPU, Meter, on_device, register
from torch import Tensor, nn

from minisd import SD15, Autoencoder, StableDiffusion, TextEncoder, Tokenizer, UNet
from minisd.features.adapters import layers_of
from minisd.features.textual_inversion import TABLE, add_token
from minisd.lora import LoRA, LowRank
from minisd.training.adapting import Adapting, InversionTask, LoRATask, Word
from minisd.training.checkpointing import checkpoint_blocks
from minisd.training.fine_tuning import FullTask
from minisd.training.loop import Options, Trainer
from minisd.training.objectives import Batch
from minisd.training.tuning_options import LoRAOptions, Tuning

# As autocast on CUDA: these in half precision, those in float32. Casts of trained weights are kept until its end.
HALF = ("conv2d", "linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "scaled_dot_product_attention")
FULL = ("layer_norm", "group_norm", "pow.Tensor_Scalar")


def register_autocast() -> list[torch.library.Library]:
    """Teach autocast to the made-up device; keep the result, or it is forgotten."""
    torch.fakegpu.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]  # type: ignore[attr-defined]
    key, kept = torch._C.DispatchKey.AutocastPrivateUse1, dict[int, Tensor]()
    library = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    others = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    others.fallback(torch.library.fallthrough_kernel)

    def cast(value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(cast(each, dtype) for each in value)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (value.requires_grad and value.is_leaf and dtype != torch.float32):
            return value.to(dtype)
        if id(value) not in kept:
            kept[id(value)] = value.to(dtype)
        return kept[id(value)]

    def kernel(name: str, half: bool) -> Callable[..., Any]:
        base, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, base), overload or "default")

        def run(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype("fakegpu") if half else torch.float32
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return operator(*cast(args, dtype), **kwargs)

        return run

    for names, half in ((HALF, True), (FULL, False)):
        for name in names:
            library.impl(name, kernel(name, half))
    clear = torch.clear_autocast_cache
    torch.clear_autocast_cache = lambda: (kept.clear(), clear())[1]  # type: ignore[func-returns-value]
    return [library, others]


def make_task(kind: str, sd: StableDiffusion, tuning: Tuning) -> Adapting:
    """A task as its constructor leaves it, without pictures."""
    task: Any = object.__new__({"lora": LoRATask, "inversion": InversionTask, "full": FullTask}[kind])
    task.sd, task.tuning, task.prior, task.contexts = sd, tuning, None, {"x": torch.empty(1, 77, 768, device=GPU)}
    if tuning.checkpointing:
        checkpoint_blocks(sd.unet)
        checkpoint_blocks(sd.text_encoder)
    if kind == "lora":
        found = layers_of({"unet": sd.unet})
        task.options, task.rate_factors = LoRAOptions(), {}
        task.model = LoRA({name: LowRank(layer, 8) for name, layer in found.items()})
        for update in task.model.updates:
            for name in ("lora_A", "lora_B"):
                setattr(update, name, nn.Parameter(torch.empty(getattr(update, name).shape, device=GPU)))
        task.model.attach(found)
    elif kind == "inversion":
        task.contexts, task.token, task.word = {}, "<it>", "x"
        task.tokenizer, task.table = add_token(sd.tokenizer, "<it>"), sd.text_encoder.state_dict()[TABLE]
        task.model = Word(torch.empty(1, 768, device=GPU))
    else:
        task.model = nn.ModuleDict({"unet": sd.unet}).requires_grad_()
    return task  # type: ignore[no-any-return]


def count(kind: str, side: int, batch: int, precision: str, checkpointing: bool, optimizer: str = "adamw") -> None:
    """Print, as JSON, what a step of lora, inversion or full takes; without checkpointing its way forward, no more."""
    mode = register()
    mode.number = 1  # of the optimizer's first step
    libraries = register_autocast()
    with torch.device("meta"):
        parts = TextEncoder(SD15.text_encoder), UNet(SD15.unet), Autoencoder(SD15.autoencoder)
    dtype = torch.float32 if kind == "full" else getattr(torch, precision)
    places = [GPU if kind == "inversion" else "cpu", GPU, "cpu"]
    placed = [on_device(part, mode, place, dtype) for part, place in zip(parts, places, strict=True)]
    with mode, tempfile.TemporaryDirectory() as folder:
        sd = StableDiffusion(SD15, Tokenizer.from_pretrained(), *placed)
        task: Any = make_task(kind, sd, Tuning(checkpointing=checkpointing))
        shape = (batch, 4, side // 8, side // 8)
        latents, noise = torch.empty(shape, device=GPU), torch.empty(shape, device=GPU)
        drawn = Batch(latents, noise, torch.zeros(batch, dtype=torch.long, device=GPU), ["x"] * batch)
        task.loss = lambda *_: task.loss_of(drawn)
        options = Options(
            Path(folder), 1, batch=batch, decays=(0.99,) if kind != "full" else (), bfloat16=precision == "bfloat16",
            optimizer=optimizer,
        )  # fmt: skip
        with Meter() as meter:
            kept = [parameter for module in (sd.unet, sd.text_encoder, task.model) for parameter in module.parameters()]
            for parameter in {id(each): each for each in kept if each.device.type == "fakegpu"}.values():
                meter.note(parameter)
            trainer = Trainer(task, options)
            before = meter.now
            if checkpointing:
                trainer.advance(0.0)
            else:
                with trainer.precision():
                    task.loss_of(drawn)
    updated = sum(p.grad is not None for p in trainer.parameters), len(trainer.parameters)
    json.dump({"peak": meter.peak, "weights": before, "after": meter.now, "updated": updated}, sys.stdout)
    del libraries
