"""What a pickle asks for, found out without carrying out any of it.

A pickle is a program for a small stack machine: it pushes constants, names functions (GLOBAL), and calls them (REDUCE).
Here the program is run with stand-ins, so nothing is called. It passes only when it names nothing beyond what a
checkpoint of torch needs, and its tensors have the bytes that the file really holds. Afterwards torch reads it with
`weights_only=True`, which is a second wall of the same kind.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

LIMIT = 2**24  # bytes of instructions; those of a full-size checkpoint with its optimiser take less than a tenth
DEPTH = 50  # of tuples in tuples: Python's hash of ten thousands of them overflows the stack
SIZE = 10_000  # of a tuple with all that is in it, counted as often as it is there: a hash goes through all of it
# What old checkpoints hold beside tensors, and nothing here needs: it is named, built and forgotten.
INERT = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",  # in the original sd-v1-4.ckpt
    "numpy.dtype",
    "numpy.core.multiarray.scalar",  # a loss or a step, as numpy 1 and 2 write it
    "numpy._core.multiarray.scalar",
)
HARMLESS = (
    "collections.OrderedDict",
    "collections.Counter",
    "builtins.set",
    "__builtin__.set",
    "_codecs.encode",
    "torch.Size",
    "torch.device",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    *INERT,
)
BYTES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2}
BYTES |= {"Char": 1, "Byte": 1, "Bool": 1}
STORAGES = {f"{place}{kind}Storage": size for place in ("torch.", "torch.cuda.") for kind, size in BYTES.items()}
DTYPE = re.compile(r"torch\.(b?float|int|uint|bool|complex)\d*")
CALLS = frozenset({"INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "STACK_GLOBAL"})
CONSTANTS = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"})
CONSTANTS |= {"NONE", "NEWTRUE", "NEWFALSE"}


class PickleError(ValueError):
    """A pickle is refused; the message says why."""


@dataclass(frozen=True)
class _Name:
    """Stands for what GLOBAL names."""

    path: str


@dataclass(frozen=True)
class _Thing:
    """Stands for a tuple, with its items, and for whatever else is built; depth and size are those of a tuple."""

    items: tuple[Any, ...] = ()
    depth: int = 0
    size: int = 1


def check_pickle(path: Path) -> None:
    """Raise PickleError where a .ckpt, .bin or .pt file asks for code, or does not hold what its pickle says."""
    with path.open("rb") as file:
        zipped, tarred = file.read(4) == b"PK\x03\x04", file.seek(257) and file.read(5) == b"ustar"
    if tarred:
        raise PickleError("is a tar archive, as torch wrote before 0.1.10; it cannot be read safely")
    if zipped != _ends_as_archive(path):
        raise PickleError("is damaged or incomplete (a zip archive without its beginning or its end)")
    if zipped:
        _check_archive(path)
    else:
        _check_old_format(path)


def _ends_as_archive(path: Path) -> bool:
    try:
        return is_zipfile(path)
    except BadZipFile:  # an archive in many volumes, or what looks like one
        return False


def _check_archive(path: Path) -> None:
    try:
        with ZipFile(path) as archive:
            members = archive.infolist()
            roots = {member.filename.partition("/")[0] for member in members}
            sizes = {member.filename.partition("/")[2]: member.file_size for member in members}
            if len(roots) != 1 or len(sizes) != len(members) or "data.pkl" not in sizes:
                raise PickleError("is damaged or incomplete (no archive as torch.save writes it)")
            if "constants.pkl" in sizes:
                raise PickleError("is a program in TorchScript; expected weights alone")
            for member in members:
                # torch maps the members as they lie in the file, so compressed ones would become weights of nonsense
                if member.compress_type != ZIP_STORED or member.file_size != member.compress_size:
                    raise PickleError(f"holds {member.filename!r} compressed, which torch.save never does")
            if sizes["data.pkl"] > LIMIT:
                raise PickleError(f"lists {sizes['data.pkl']:,} bytes of objects; a checkpoint has less than {LIMIT:,}")
            program = io.BytesIO(archive.read(f"{roots.pop()}/data.pkl"))
    except (BadZipFile, EOFError, NotImplementedError, RuntimeError, UnicodeError) as error:
        raise PickleError(f"is damaged or incomplete ({error})") from error
    for key, count in storages(program).items():
        found = sizes.get(f"data/{key}")
        if found != count:
            raise PickleError(f"is damaged or incomplete (data/{key} has {found} bytes, not {count})")


def _check_old_format(path: Path) -> None:
    """Before torch 1.6: a magic number, a version, facts of the machine, the objects, the keys; then the storages."""
    with path.open("rb") as file:
        program = io.BytesIO(file.read(LIMIT))
    total = 0
    for _ in range(5):
        total += sum(storages(program).values())
    if total > path.stat().st_size:
        raise PickleError(f"is damaged or incomplete (its tensors need {total:,} bytes, more than it has)")


def storages(program: io.BytesIO) -> dict[str, int]:
    """Go through one pickle; return the keys of the storages it wants, each with its number of bytes.

    Raises PickleError for whatever a checkpoint of torch has no need of.
    """
    stacks: list[list[Any]] = [[]]
    memo: dict[int, Any] = {}
    wanted: dict[str, int] = {}
    try:
        for operation, argument, _ in _operations(program):
            name, stack = operation.name, stacks[-1]
            if name in CONSTANTS:
                stack.append(argument)
            elif name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "EMPTY_TUPLE"):
                stack.append(_Thing())
            elif name == "MARK":
                stacks.append([])
            elif name == "GLOBAL":
                stack.append(_named(argument.replace(" ", ".")))
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "TUPLE":
                stacks[-2].append(_tuple(stacks.pop()))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                stack.append(_tuple([stack.pop() for _ in range(int(name[-1]))][::-1]))
            elif name in ("REDUCE", "NEWOBJ"):
                arguments, function = stack.pop(), stack.pop()
                if not isinstance(function, _Name):
                    raise PickleError("is damaged or incomplete (it calls what is no function)")
                stack.append(_tuple([arguments]))
            elif name in ("APPEND", "BUILD"):
                stack.pop()
            elif name == "SETITEM":
                del stack[-2:]
            elif name in ("APPENDS", "SETITEMS"):
                stacks.pop()
            elif name == "BINPERSID":
                key, count = _storage(stack.pop())
                if wanted.setdefault(key, count) != count:
                    raise PickleError(f"is damaged or incomplete (storage {key} has two sizes)")
                stack.append(_Thing())
            elif name in CALLS:
                raise PickleError(f"asks for code and was refused (instruction {name})")
            elif name not in ("PROTO", "STOP"):
                raise PickleError(f"is damaged, or no checkpoint of torch (instruction {name})")
    except (IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, PickleError):
            raise
        raise PickleError(f"is damaged or incomplete ({type(error).__name__} in its list of objects)") from error
    return wanted


def _operations(program: io.BytesIO) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]:
    try:
        yield from pickletools.genops(program)
    except (ValueError, UnicodeError) as error:
        raise PickleError(f"is damaged or incomplete ({error})") from error


def _named(path: str) -> _Name:
    if path not in HARMLESS and path not in STORAGES and not DTYPE.fullmatch(path):
        raise PickleError(f"asks for code and was refused ({path[:100]!r})")
    return _Name(path)


def _tuple(items: list[Any]) -> _Thing:
    inside = [item for item in items if isinstance(item, _Thing)]
    depth = 1 + max((item.depth for item in inside), default=0)
    size = 1 + len(items) + sum(item.size for item in inside)
    if depth > DEPTH or size > SIZE:
        raise PickleError(f"holds tuples nested {depth} deep, of {size:,} items; no checkpoint does. Do not trust it")
    return _Thing(tuple(items), depth, size)


def _storage(value: _Thing) -> tuple[str, int]:
    """Key and bytes of a storage, from ("storage", type, key, device, elements) and, in old files, one thing more."""
    kind, of, key, _, count = value.items[:5] if isinstance(value, _Thing) else (value, *[None] * 4)
    if kind != "storage" or not isinstance(of, _Name) or of.path not in STORAGES:
        raise PickleError(f"asks for code and was refused (a persistent {str(kind)[:50]!r})")
    if not isinstance(key, str) or type(count) is not int or count < 0:
        raise PickleError("is damaged or incomplete (a storage without key or size)")
    return key, count * STORAGES[of.path]
