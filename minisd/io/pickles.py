"""What a pickle asks for, found out without executing it.

A pickle is a program for a small stack machine: it pushes constants, names functions (GLOBAL) and calls them (REDUCE).
`torch.load(weights_only=True)` executes it with harmless functions only; but some programs would still exhaust memory,
crash Python, or map other bytes of the file as weights. So such files are checked first: the program may use the
instructions and names of checkpoints only, and tuples of sensible size.
"""

from __future__ import annotations

import io
import pickletools
import re
from pathlib import Path
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
NAMES = re.compile(
    r"collections\.(OrderedDict|Counter)|(builtins|__builtin__)\.set|_codecs\.encode|torch\.(Size|device)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.(b?float|int|uint|bool|complex)\d*"
    r"|torch\.(cuda\.)?(Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
)
TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE", "NEWOBJ"}  # and objects made from tuples
CHANGES = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"}  # of the object below on the stack
CONSTANTS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
OBJECTS = {"NONE", "NEWTRUE", "NEWFALSE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "EMPTY_TUPLE"}
OTHERS = {"PROTO", "STOP", "MARK", "GLOBAL", "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"}
INSTRUCTIONS = TUPLES | CHANGES | CONSTANTS | OBJECTS | OTHERS
IMPORTS = {"INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "STACK_GLOBAL"}  # other ways to name or call functions
# How many objects an instruction takes from the stack and pushes, and whether it takes all above the last mark.
EFFECTS = {
    opcode.name: (
        sum(each.name not in ("mark", "stackslice") for each in opcode.stack_before),
        len(opcode.stack_after),
        pickletools.markobject in opcode.stack_before,
    )
    for opcode in pickletools.opcodes
}


class PickleError(Exception):
    """A pickle is refused; the message says why."""


def check_pickle(path: Path) -> None:
    """Raise PickleError where a .ckpt, .bin or .pt file asks for code, or is not a file that torch.save writes."""
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
    for _ in range(5):
        check_program(program)


def record_sizes(path: Path) -> list[int]:
    """The bytes of each storage in a zip archive of torch.save."""
    with ZipFile(path) as archive:
        return [each.file_size for each in archive.infolist() if each.filename.partition("/")[2].startswith("data/")]


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
            if (size := sizes["data.pkl"]) > MAX_PROGRAM_BYTES:
                raise PickleError(f"lists {size:,} bytes of objects; expected at most {MAX_PROGRAM_BYTES:,}")
            program = io.BytesIO(archive.read(f"{roots.pop()}/data.pkl"))
    except (BadZipFile, EOFError, NotImplementedError, RuntimeError, UnicodeError) as error:
        raise PickleError(f"is damaged or incomplete ({error})") from error
    check_program(program)


def check_program(program: io.BytesIO) -> None:
    """Walk through one pickle; raise PickleError if it is damaged or does what checkpoints do not need."""
    try:
        _walk(program)
    except (IndexError, KeyError, ValueError) as error:
        raise PickleError(f"is damaged or incomplete (in its list of objects: {error})") from error


def _walk(program: io.BytesIO) -> None:
    stack: list[int] = []  # for each object its size, if it is a tuple: the number of its items, with nested ones
    marks: list[int] = []
    memo: dict[object, int] = {}
    for opcode, argument, _ in pickletools.genops(program):
        name = opcode.name
        if name not in INSTRUCTIONS:
            fault = "asks for code and was refused" if name in IMPORTS else "is damaged, or not a checkpoint of torch"
            raise PickleError(f"{fault} (instruction {name})")
        if name == "GLOBAL":
            path = str(argument).replace(" ", ".")
            if path not in INERT and NAMES.fullmatch(path) is None:
                raise PickleError(f"asks for code and was refused ({path[:100]!r})")
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
                raise PickleError(f"holds a tuple of {stack[-1]:,} nested items; checkpoints do not. Do not trust it")
