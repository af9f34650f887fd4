"""What is computed, and how often: operators of torch, counted by name."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("addmm", "mm", "bmm", "baddbmm", "convolution")  # what a linear layer or a convolution becomes
COPIES = ("clone", "_to_copy", "copy_")
MAYBE = ("to", "contiguous", "reshape")  # in inference mode torch does not say whether they copied


class Counting(TorchDispatchMode):
    """Counts the operators that are called within it, by their names in torch: "addmm", "clone" …"""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, result = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        copied = name in MAYBE and result.untyped_storage()._cdata != args[0].untyped_storage()._cdata
        self.calls["clone" if copied else name] += 1
        return result

    def among(self, names: Sequence[str]) -> int:
        return sum(self.calls[name] for name in names)
