"""Static safety checks of pickle files.

A pickle is a program for a small stack machine: it pushes constants, imports functions (GLOBAL) and calls them
(REDUCE). `torch.load(weights_only=True)` only allows harmless functions, but some programs can still exhaust memory,
crash Python, or map the wrong bytes of the file as weights. Files are therefore checked without executing them: only
the opcodes and names found in checkpoints are allowed, and tuples of limited size.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo, is_zipfile

import torch

MAX_PROGRAM_BYTES = 2**24  # ten times the size for a full checkpoint with optimizer state
MAX_TUPLE_SIZE = 1000  # including nested items; hashing deeply nested tuples can hang or overflow Python's stack
# Non-tensor classes in old checkpoints, which are replaced by inert stand-ins.
INERT = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",  # in the original sd-v1-4.ckpt
    "numpy.dtype",
    "numpy.core.multiarray.scalar",  # a loss or step count, as pickled by NumPy 1 and 2
    "numpy._core.multiarray.scalar",
    "torch.nn.modules.container.ParameterDict",  # the vectors of a textual inversion
)
NAMES = re.compile(
    r"collections\.(OrderedDict|Counter)|(builtins|__builtin__)\.set|_codecs\.encode|torch\.(Size|device)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.(b?float|int|uint|bool|complex)\d*"
    r"|torch\.(cuda\.)?(Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
)
TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE", "NEWOBJ"}  # including objects built from tuples
CHANGES = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"}  # modify the object below on the stack
CONSTANTS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
OBJECTS = {"NONE", "NEWTRUE", "NEWFALSE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "EMPTY_TUPLE"}
OTHERS = {"PROTO", "STOP", "MARK", "GLOBAL", "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"}
INSTRUCTIONS = TUPLES | CHANGES | CONSTANTS | OBJECTS | OTHERS
IMPORTS = {"INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "STACK_GLOBAL"}  # other ways to import or call functions
# For each opcode, the number of objects popped and pushed, and whether it pops everything above the last mark.
EFFECTS = {
    opcode.name: (
        sum(each.name not in ("mark", "stackslice") for each in opcode.stack_before),
        len(opcode.stack_after),
        pickletools.markobject in opcode.stack_before,
    )
    for opcode in pickletools.opcodes
}


class PickleError(Exception):
    """Raised for a pickle that is unsafe or corrupted."""


def check_pickle(path: Path) -> None:
    """Raise PickleError if a .ckpt, .bin or .pt file could run code, or was not written by torch.save."""
    with path.open("rb") as file:
        zipped, tarred = file.read(4) == b"PK\x03\x04", file.seek(257) and file.read(5) == b"ustar"
    if tarred:
        raise PickleError("is a tar archive (torch before 0.1.10), which cannot be read safely")
    try:
        ends_as_archive = is_zipfile(path)
    except BadZipFile:  # a multi-volume archive
        ends_as_archive = False
    if zipped != ends_as_archive:
        raise PickleError("is corrupted or incomplete (a zip archive without its beginning or its end)")
    if zipped:
        _check_archive(path)
        return
    # torch before 1.6: five pickles (magic number, version, system info, objects, keys), then the storages
    with path.open("rb") as file:
        program = io.BytesIO(file.read(MAX_PROGRAM_BYTES))
    for _ in range(5):
        check_program(program)


def record_sizes(path: Path) -> list[int]:
    """Return the size in bytes of each storage in a zip archive written by torch.save."""
    with ZipFile(path) as archive:
        return [each.file_size for each in archive.infolist() if each.filename.partition("/")[2].startswith("data/")]


def _check_archive(path: Path) -> None:
    try:
        with ZipFile(path) as archive:
            members = archive.infolist()
            roots = {member.filename.partition("/")[0] for member in members}
            sizes = {member.filename.partition("/")[2]: member.file_size for member in members}
            if len(roots) != 1 or len(sizes) != len(members) or "data.pkl" not in sizes:
                raise PickleError("is corrupted or incomplete (not an archive written by torch.save)")
            if "constants.pkl" in sizes:
                raise PickleError("is a TorchScript program; expected weights only")
            for member in members:
                # torch maps the members as stored, so compressed ones would be read as garbage
                if member.compress_type != ZIP_STORED or member.file_size != member.compress_size:
                    raise PickleError(f"contains {member.filename!r} in compressed form, which torch.save never writes")
            if (size := sizes["data.pkl"]) > MAX_PROGRAM_BYTES:
                raise PickleError(f"has a pickle of {size:,} bytes; expected at most {MAX_PROGRAM_BYTES:,}")
            _check_torch_agrees(path, archive)
            program = io.BytesIO(archive.read(f"{roots.pop()}/data.pkl"))
    except (BadZipFile, EOFError, NotImplementedError, RuntimeError, UnicodeError, struct.error) as error:
        raise PickleError(f"is corrupted or incomplete ({error})") from error
    check_program(program)


def _check_torch_agrees(path: Path, archive: ZipFile) -> None:
    """Raise PickleError unless torch's own reader of zip archives finds the same records in the same places.

    A file can hold two central directories, of which each reader finds another one.
    """
    try:
        reader: Any = torch._C.PyTorchFileReader(str(path))
        size = getattr(reader, "get_record_size", lambda name: len(reader.get_record(name)))  # torch 2.13 has it
        places = {name: (reader.get_record_offset(name), size(name)) for name in reader.get_all_records()}
        program = reader.get_record("data.pkl")
    except RuntimeError as error:
        raise PickleError("is corrupted or incomplete (torch cannot open the archive)") from error
    members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
    same = places == {name: (_data_offset(path, member), member.file_size) for name, member in members.items()}
    # torch ignores case when it looks a record up
    if (
        not same
        or len({name.lower() for name in members}) != len(members)
        or program != archive.read(members["data.pkl"])
    ):
        raise PickleError("has two tables of contents that differ, which torch.save never writes; do not trust it")


def _data_offset(path: Path, member: ZipInfo) -> int:
    """Return where the data of a member begins, from its local header."""
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        return file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))


def check_program(program: io.BytesIO) -> None:
    """Check one pickle. Raises PickleError if it is corrupted or uses anything that checkpoints do not need."""
    try:
        _walk(program)
    except (IndexError, KeyError, ValueError) as error:
        raise PickleError(f"is corrupted or incomplete (in its pickle: {error})") from error


def _walk(program: io.BytesIO) -> None:
    stack: list[int] = []  # the size of each object: for tuples, the number of items, including nested ones
    marks: list[int] = []
    memo: dict[object, int] = {}
    for opcode, argument, _ in pickletools.genops(program):
        name = opcode.name
        if name not in INSTRUCTIONS:
            fault = "could run code" if name in IMPORTS else "is corrupted or not a torch checkpoint"
            raise PickleError(f"{fault} (opcode {name})")
        if name == "GLOBAL":
            path = str(argument).replace(" ", ".")
            if path not in INERT and NAMES.fullmatch(path) is None:
                raise PickleError(f"could run code ({path[:100]!r})")
        takes, pushes, to_mark = EFFECTS[name]
        start = (marks.pop() if to_mark else len(stack)) - takes
        if start < 0:
            raise IndexError("the stack is empty")
        sizes = stack[start:]
        del stack[start:]
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif pushes:
            size = sizes[0] if name in CHANGES else memo[argument] if name.endswith("GET") else 1
            stack.append(1 + sum(sizes) if name in TUPLES else size)
            if stack[-1] > MAX_TUPLE_SIZE:
                raise PickleError(f"has a tuple of {stack[-1]:,} nested items, unlike any checkpoint; do not trust it")
