"""Pickles that ask for code, memory or the impossible, and the files around them."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import torch


def text(value: str) -> bytes:
    """A string, as a pickle of protocol 2 has it."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def call(module: str, name: str, *arguments: str) -> bytes:
    """A pickle that calls a function with strings."""
    return f"\x80\x02c{module}\n{name}\n(".encode("latin-1") + b"".join(map(text, arguments)) + b"tR."


def programs(canary: Path) -> dict[str, bytes]:
    """Pickles that leave a file behind where they are carried out, each by another way to get at a function."""
    shell, python = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    system = b"cposix\nsystem\n"
    inner = call("posix", "system", shell)
    wrapped = io.BytesIO()
    torch.save(None, wrapped)
    return {
        "os.system": call("os", "system", shell),
        "posix.system": call("posix", "system", shell),
        "eval": call("builtins", "eval", python),
        "exec": call("builtins", "exec", python),
        "python 2 eval": call("__builtin__", "eval", python),
        "pty": call("subprocess", "getoutput", shell),
        "pager": call("pydoc", "pipepager", "", shell),
        "numpy": call("numpy.f2py.crackfortran", "myeval", python),
        "pickle in a pickle": b"\x80\x02cpickle\nloads\nC" + bytes([len(inner)]) + inner + b"\x85R.",
        "text of protocol 0": b"cposix\nsystem\n(V" + shell.encode() + b"\ntR.",
        "INST": b"(V" + shell.encode() + b"\niposix\nsystem\n.",
        "OBJ": b"(" + system + b"V" + shell.encode() + b"\no.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + text(shell) + b"\x85R.",
        "NEWOBJ_EX": b"\x80\x04cfunctools\npartial\n" + system + text(shell) + b"\x86}\x92)R.",
        "NEWOBJ": b"\x80\x02cfunctools\npartial\n" + system + text(shell) + b"\x86\x81)R.",
        "getattr": b"\x80\x02cbuiltins\ngetattr\ncos\npath\n" + text("os") + b"\x86R0" + inner[2:],
        "dotted name": b"\x80\x04\x8c\x02os\x8c\x0bpath.os.sys\x930" + inner[2:],
        "map": b"\x80\x02cbuiltins\nlist\ncbuiltins\nmap\n" + system + text(shell) + b"\x85\x86R\x85R.",
        "BUILD": b"\x80\x02cfunctools\npartial\ncbuiltins\nprint\n\x85R(" + system + text(shell) + b"\x85}NtbN0)R.",
        "copyreg": b"\x80\x02ccopyreg\n__newobj__\ncfunctools\npartial\n" + system + text(shell) + b"\x87R)R.",
        "import": b"\x80\x02coperator\nmethodcaller\n" + text("system") + text(shell) + b"\x86R"
        + b"cbuiltins\n__import__\n" + text("os") + b"\x85R\x85R.",
        "in a dictionary": b"\x80\x02}" + text("state_dict") + b"}" + text("x") + inner[2:-1] + b"ss.",
        "as a key": b"\x80\x02}" + inner[2:-1] + b"Ns.",
        "twice, by the memo": b"\x80\x02" + system + b"q\x000h\x00" + text(shell) + b"\x85R.",
    }  # fmt: skip


# What no plain unpickler would carry out, or would but to another end: torch's own doors, persistent names, sizes.
REFUSED = {
    "torch.load": call("torch.serialization", "load", "x.pt"),
    "_load_from_bytes": b"\x80\x02ctorch.storage\n_load_from_bytes\nU\x03abc\x85R.",
    "from type": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nNNNtR.",
    "jit": call("torch.jit", "load", "x.pt"),
    "hub": call("torch.hub", "load", "a/b", "c"),
    "dynamic library": call("ctypes", "CDLL", "x.so"),
    "numpy array": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R.",
    "lambda": call("types", "LambdaType", "x"),
    "persistent module": b"\x80\x02(" + text("module") + b"NNNNtQ.",
    "persistent text": b"Pabc\n.",
    "EXT1": b"\x80\x02\x82\x01.",
    "another callback": b"\x80\x02cpytorch_lightning.callbacks.model_checkpoint\nOther\n.",
    "part of the callback": b"\x80\x02cpytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint\n__init__\n.",
    "bytearray of 16 TB": b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R.",
    "tensor of 16 TB": b"\x80\x02ctorch\nTensor\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R.",
    "text of 4 EB": b"\x80\x04\x8d\x00\x00\x00\x00\x00\x00\x00\x40.",
    "bytes of 4 EB": b"\x80\x04\x8e\x00\x00\x00\x00\x00\x00\x00\x40.",
    "frame of 4 EB": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x40.",
    "number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "memo without end": b"\x80\x02Nr\xff\xff\xff\xffj\xfe\xff\xff\xff.",
    "a million tuples in each other, as a key": b"\x80\x02}N" + b"\x85" * 10**6 + b"Ns.",
    "laughs": b"\x80\x02}N" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(45)) + b"Ns.",
    "mark alone": b"\x80\x02t.",
    "an empty stack": b"\x80\x02R.",
    "no end": b"\x80\x02}",
}  # fmt: skip


def archive(program: bytes, compression: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    """torch.save's zip archive around another pickle; more: other members, or another content, by their names."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        members = {"data.pkl": program, "byteorder": b"little", "version": b"3\n", "data/0": bytes(16), **more}
        for name, content in members.items():
            file.writestr(f"model/{name}", content)
    return stream.getvalue()


def archives_read_in_two_ways(good: bytes, bad: bytes) -> dict[str, bytes]:
    """Archives in which one reader finds the pickle `good`, and another one `bad`."""
    first, second = archive(good), archive(bad)
    return {
        "one after the other": second + first,
        "the other one in the comment": first[:-2] + len(second).to_bytes(2, "little") + second,
        "names that differ in case": archive(good, **{"DATA.PKL": bad}),
        "names that differ in case, the other way": archive(good, **{"Data.pkl": bad, "version": b"3\n"}),
        "a name with a null byte": archive(good, **{"data.pkl_x": bad}).replace(b"data.pkl_x", b"data.pkl\0x"),
        "two members of one name": archive(good, **{"datb.pkl": bad}).replace(b"datb.pkl", b"data.pkl"),
        "two zip64 records": zip64(first, second),
        "two zip64 records, the other way": zip64(second, first),
        "another name beside the data": first.replace(b"model/data.pkl", b"model/datb.pkl", 1),
        "another length beside the data": first.replace(b"\x0e\0\0\0model/data.pkl", b"\x0e\0\x04\0model/data.pkl", 1),
    }


def zip64(first: bytes, second: bytes) -> bytes:
    """Two archives in one file: `first` stands where the zip64 record usually is, `second` where the locator points."""
    records, content = [], b""
    for data in (first, second):
        end = data.rindex(b"PK\5\6")
        count, size, start = struct.unpack("<HLL", data[end + 10 : end + 20])
        directory = bytearray(data[start : start + size])
        at = 0
        while at < size:  # each entry says where its member begins
            name, extra, comment = struct.unpack("<HHH", directory[at + 28 : at + 34])
            (offset,) = struct.unpack("<L", directory[at + 42 : at + 46])
            directory[at + 42 : at + 46] = struct.pack("<L", offset + len(content))
            at += 46 + name + extra + comment
        start += len(content)
        content += data[: start - len(content)] + directory
        records.append(b"PK\6\6" + struct.pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, count, count, size, start))
    usual, elsewhere = records
    locator = b"PK\6\7" + struct.pack("<LQL", 0, len(content), 1)
    end = b"PK\5\6" + struct.pack("<HHHHLLH", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    return content + elsewhere + usual + locator + end
