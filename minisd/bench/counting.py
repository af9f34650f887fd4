"""Counts of a network's work: FLOP by kind and by level, the bytes that operators move, and the peak of memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from minisd.autoencoder import Autoencoder
from minisd.config import ModelConfig
from minisd.unet import UNet

KINDS = {"convolution": "convolutions", "mm": "linear layers", "addmm": "linear layers", "bmm": "attention"}
RESAMPLING = ("upsamplers", "downsamplers")

Sides = Mapping[str, Sequence[int]]


def by_kind(counts: Mapping[Callable[..., Any], int]) -> Counter[str]:
    """FLOP of convolutions, linear layers and attention, from those of single operations (as on the meta device).

    Raises KeyError if an operation has no kind.
    """
    found = Counter(dict.fromkeys(KINDS.values(), 0))
    for operation, flop in counts.items():
        found[KINDS[operation.__name__]] += flop
    return found


def by_level(counter: FlopCounterMode, sides: Sides) -> dict[str, Counter[str]]:
    """FLOP by kind for the middle and for each size of map; `sides` are those of the blocks, for each list of blocks.

    The convolution that ends a block by resampling works at the next size already, so it is counted there.
    """
    found = {"middle": Counter[str]()} | {f"{side}²": Counter[str]() for side in sides["up_blocks"]}
    for name, counts in counter.get_flop_counts().items():
        _, *path = name.split(".")
        if path == ["mid_block"]:
            found["middle"].update(by_kind(counts))
        elif len(path) == 2 and path[0] in sides:
            found[f"{sides[path[0]][int(path[1])]}²"].update(by_kind(counts))
        elif len(path) == 4 and path[2] in RESAMPLING:
            here, there = sides[path[0]][int(path[1]) :][:2]
            found[f"{here}²"].subtract(by_kind(counts))
            found[f"{there}²"].update(by_kind(counts))
    return found


class Meter(TorchDispatchMode):
    """Peak memory of the tensors that operators make while it is entered; those from before are not counted.

    A tensor's bytes count from the operator that makes it until nothing refers to it any more; a view has none of its
    own. It works on the meta device and on fake tensors, where nothing is computed.

    Attributes:
        alive: Bytes of each storage that is alive.
        peak: The most bytes alive at the same time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        given = _storages((args, kwargs))
        for key, storage in _storages(result).items():
            if key not in given and key not in self.alive:
                self.alive[key] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def _storages(values: Any) -> dict[int, torch.UntypedStorage]:
    """The storages of all tensors in nested containers, by their addresses as C++ objects."""
    tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
    return {x.untyped_storage()._cdata: x.untyped_storage() for x in tensors}


MOVE_NOTHING = ("_unsafe_view", "device", "empty", "new_empty")


class _Traffic(TorchDispatchMode):
    """Adds up the bytes that operators read and write; views, new memory and questions for the device move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if not operator.is_view and operator.overloadpacket.__name__ not in MOVE_NOTHING:
            # an expanded tensor has more numbers than memory
            self.bytes += sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in tensors)
        return result


def bytes_moved(config: ModelConfig, change: Callable[[nn.Module], object] | None = None) -> dict[str, int]:
    """Count the bytes that the operators of a guided step and of decoding read and write, at the model's own size.

    Every operator is taken to read its tensors from memory and to write its answer there, in float32 on a CPU; nothing
    is computed. `change`, such as `speed_up`, is applied to both networks first.
    """
    side, found = config.unet.sample_size, {}
    with FakeTensorMode(), torch.no_grad():
        unet, autoencoder = UNet(config.unet), Autoencoder(config.autoencoder)
        if change is not None:
            change(unet)
            change(autoencoder)
        latents, context = torch.empty(2, 4, side, side), torch.empty(2, 77, config.unet.cross_attention_dim)
        calls: dict[str, Callable[[], Any]] = {
            "step": lambda: unet(latents, torch.tensor(481.0), context),
            "decode": lambda: autoencoder.decode(latents[:1]),
        }
        for name, call in calls.items():
            with _Traffic() as traffic:
                call()
            found[name] = traffic.bytes
    return found
