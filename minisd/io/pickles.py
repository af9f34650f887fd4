"""What a pickle asks for, found out without executing it.

A pickle is a program for a small stack machine: it pushes constants, names functions (GLOBAL) and calls them (REDUCE).
`torch.load(weights_only=True)` executes it with harmless functions only. But some programs would still exhaust memory,
crash Python, or fill tensors with other bytes of the file. So this module first walks through the program, computing
nothing. It may name functions from a list only, build tuples of sensible size, and load tensors whose bytes are there.
"""

from __future__ import annotations

import io
import pickletools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

MAX_PROGRAM_BYTES = 2**24  # ten times those of a full-size checkpoint with its optimiser
MAX_TUPLE_SIZE = 1000  # with nested ones; hashing deeply nested tuples takes for ever, or overflows Python's stack
# Classes that old checkpoints name beside tensors; they are replaced by ones that do nothing.
INERT = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",  # in the original sd-v1-4.ckpt
    "numpy.dtype",
    "numpy.core.multiarray.scalar",  # a loss or a step, as numpy 1 and 2 write it
    "numpy._core.multiarray.scalar",
)
ALLOWED = (
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
DTYPE = re.compile(r"torch\.(b?float|int|uint|bool|complex)\d*")
ITEM_BYTES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2}
ITEM_BYTES |= {"Char": 1, "Byte": 1, "Bool": 1}
STORAGES = {f"{module}{kind}Storage": size for module in ("torch.", "torch.cuda.") for kind, size in ITEM_BYTES.items()}

CONSTANTS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
OBJECTS = {"NONE", "NEWTRUE", "NEWFALSE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "EMPTY_TUPLE"}
TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
CALLS = {"REDUCE", "NEWOBJ"}
CHANGES = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"}  # of the object below on the stack
OTHERS = {"PROTO", "STOP", "MARK", "GLOBAL", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "BINPERSID"}
# How many objects an instruction takes from the stack, and whether it takes all above the last mark as well.
OPCODES = {
    opcode.name: (
        sum(each.name not in ("mark", "stackslice") for each in opcode.stack_before),
        pickletools.markobject in opcode.stack_before,
    )
    for opcode in pickletools.opcodes
    if opcode.name in CONSTANTS | OBJECTS | TUPLES | CALLS | CHANGES | OTHERS
}
IMPORTS = {"INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "STACK_GLOBAL"}  # other ways to name or call functions


class PickleError(ValueError):
    """A pickle is refused; the message says why."""


@dataclass(frozen=True)
class _Global:
    """Stands for a function or class."""

    name: str


@dataclass(frozen=True)
class _Value:
    """Stands for any other object. Items and size, counted with nested ones, are those of a tuple."""

    items: tuple[Any, ...] = ()
    size: int = 1


def check_pickle(path: Path) -> None:
    """Raise PickleError where a .ckpt, .bin or .pt file asks for code or lacks the bytes that its tensors need."""
    with path.open("rb") as file:
        zipped, tarred = file.read(4) == b"PK\x03\x04", file.seek(257) and file.read(5) == b"ustar"
    if tarred:
        raise PickleError("is a tar archive, as torch wrote before 0.1.10; it cannot be read safely")
    try:
        ends_as_archive = is_zipfile(path)
    except BadZipFile:  # an archive in several volumes
        ends_as_archive = False
    if zipped != ends_as_archive:
        raise PickleError("is damaged or incomplete (a zip archive without its beginning or its end)")
    if zipped:
        _check_archive(path)
        return
    # Before torch 1.6: five pickles (magic number, version, machine, objects, keys), then the storages.
    with path.open("rb") as file:
        program = io.BytesIO(file.read(MAX_PROGRAM_BYTES))
    total = sum(sum(storages(program).values()) for _ in range(5))
    if total > path.stat().st_size:
        raise PickleError(f"is damaged or incomplete (its tensors need {total:,} bytes, more than it has)")


def _check_archive(path: Path) -> None:
    try:
        with ZipFile(path) as archive:
            members = archive.infolist()
            roots = {member.filename.partition("/")[0] for member in members}
            sizes = {member.filename.partition("/")[2]: member.file_size for member in members}
            if len(roots) != 1 or len(sizes) != len(members) or "data.pkl" not in sizes:
                raise PickleError("is damaged or incomplete (not an archive as torch.save writes it)")
            if "constants.pkl" in sizes:
                raise PickleError("is a program in TorchScript; expected weights alone")
            for member in members:
                # torch maps the members as they lie in the file, so compressed ones would become meaningless weights
                if member.compress_type != ZIP_STORED or member.file_size != member.compress_size:
                    raise PickleError(f"holds {member.filename!r} compressed, which torch.save never does")
            if sizes["data.pkl"] > MAX_PROGRAM_BYTES:
                raise PickleError(
                    f"lists {sizes['data.pkl']:,} bytes of objects; expected at most {MAX_PROGRAM_BYTES:,}"
                )
            program = io.BytesIO(archive.read(f"{roots.pop()}/data.pkl"))
    except (BadZipFile, EOFError, NotImplementedError, RuntimeError, UnicodeError) as error:
        raise PickleError(f"is damaged or incomplete ({error})") from error
    for key, size in storages(program).items():
        found = sizes.get(f"data/{key}")
        if found != size:
            raise PickleError(f"is damaged or incomplete (data/{key} has {found} bytes, not {size})")


def storages(program: io.BytesIO) -> dict[str, int]:
    """Walk through one pickle and return the keys of the storages that it loads, with their sizes in bytes.

    Raises:
        PickleError: the pickle is damaged, or does what checkpoints of torch do not need.
    """
    found: dict[str, int] = {}
    try:
        _walk(program, found)
    except PickleError:
        raise
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise PickleError(f"is damaged or incomplete (in its list of objects: {error})") from error
    return found


def _walk(program: io.BytesIO, found: dict[str, int]) -> None:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(program):
        name = opcode.name
        if name not in OPCODES:
            fault = "asks for code and was refused" if name in IMPORTS else "is damaged, or not a checkpoint of torch"
            raise PickleError(f"{fault} (instruction {name})")
        count, to_mark = OPCODES[name]
        start = (marks.pop() if to_mark else len(stack)) - count
        if start < 0:
            raise IndexError("the stack is empty")
        operands = stack[start:]
        del stack[start:]
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name not in ("PROTO", "STOP"):
            stack.append(_result(name, argument, operands, found))


def _result(name: str, argument: Any, operands: list[Any], found: dict[str, int]) -> Any:
    """What an instruction pushes onto the stack."""
    if name in CONSTANTS:
        return argument
    if name == "GLOBAL":
        return _check_name(argument.replace(" ", "."))
    if name in CHANGES:
        return operands[0]
    if name in CALLS and not isinstance(operands[0], _Global):
        raise TypeError("it calls what is not a function")
    if name in TUPLES or name in CALLS:
        return _tuple(operands)
    if name == "BINPERSID":
        key, size = _storage(operands[0])
        if found.setdefault(key, size) != size:
            raise PickleError(f"is damaged or incomplete (storage {key} has two sizes)")
    return _Value()


def _check_name(name: str) -> _Global:
    if name not in ALLOWED and name not in STORAGES and not DTYPE.fullmatch(name):
        raise PickleError(f"asks for code and was refused ({name[:100]!r})")
    return _Global(name)


def _tuple(items: list[Any]) -> _Value:
    size = 1 + sum(item.size if isinstance(item, _Value) else 1 for item in items)
    if size > MAX_TUPLE_SIZE:
        raise PickleError(f"holds a tuple of {size:,} nested items; checkpoints do not. Do not trust it")
    return _Value(tuple(items), size)


def _storage(value: Any) -> tuple[str, int]:
    """Key and bytes of a storage from ("storage", type, key, device, elements, …)."""
    items = value.items if isinstance(value, _Value) else ()
    kind, storage, key, _, count = (*items, *[None] * 5)[:5]
    if kind != "storage" or not isinstance(storage, _Global) or storage.name not in STORAGES:
        raise PickleError(f"asks for code and was refused (a persistent {str(kind)[:50]!r})")
    if not isinstance(key, str) or type(count) is not int or count < 0:
        raise PickleError("is damaged or incomplete (a storage without key or size)")
    return key, count * STORAGES[storage.name]
