"""Hostile files: opening them runs no code and takes little memory. Part of scripts/torture.py.

Every file is opened by every reader that a user may give it to, in a separate process with limited memory.
"""

import builtins
import functools
import gzip
import io
import json
import operator
import os
import pickle
import resource
import runpy
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from trellisnet import weights
from trellisnet.data import archive, pixels
from trellisnet.errors import UserError
from trellisnet.models import TrellisLanguageModel
from trellisnet.training import checkpoint

MEMORY = 2**30  # bytes that readers may allocate beyond what the process has
HUGE = 2**36  # bytes or numbers that files claim to hold
BOMB = 2**28  # bytes that small files unpack to


class Call:
    """Pickles to the call of a function, which an ordinary unpickler would execute."""

    def __init__(self, function: Callable, *args: Any):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class State(OrderedDict):
    """Pickles to an OrderedDict that sets its own attributes when it is loaded."""

    def __init__(self, attributes: dict[str, Any]):
        super().__init__(w=torch.zeros(1))
        self.attributes = attributes

    def __reduce__(self):
        return OrderedDict, (), self.attributes, None, iter(self.items())


def code(trap: Path) -> dict[str, Any]:
    """Objects that create the folder `trap` if loading them runs their code."""
    statement = f"__import__('os').mkdir({str(trap)!r})"
    calls = {
        "os.system": Call(os.system, f"mkdir '{trap}'"),
        "os.mkdir": Call(os.mkdir, str(trap)),
        "eval": Call(eval, statement),
        "exec": Call(exec, statement),
        "getattr": Call(Call(getattr, builtins, "eval"), statement),
        "nested": Call(tuple, [Call(list, [Call(eval, statement)])]),
        "deep": functools.reduce(lambda inner, _: Call(str, inner), range(200), Call(eval, statement)),
        "partial": Call(functools.partial(eval, statement)),
        "methodcaller": Call(operator.methodcaller("mkdir"), trap),
        "import": Call(__import__, "antigravity"),
        "subprocess": Call(subprocess.check_call, ["mkdir", str(trap)]),
        "runpy": Call(runpy._run_code, statement, {}),
        "compile": Call(exec, Call(compile, statement, "x", "exec")),
        "open": Call(open, trap, "w"),
        "torch.load": Call(torch.load, str(trap)),
        "apply": Call(torch.Tensor.map_, torch.zeros(1), torch.zeros(1), Call(eval, f"lambda *_: {statement}")),
        "storage": Call(torch.storage._load_from_bytes, pickle.dumps(Call(eval, statement))),
    }
    content = {f"call of {name}": call for name, call in calls.items()}
    content["a call as a key"] = {Call(eval, f"{statement} or 'k'"): 1}
    content["a call in the metadata"] = State({"_metadata": Call(eval, statement)})
    content["a call beside weights"] = OrderedDict({"encoder.weight": torch.zeros(20, 4), "x": calls["eval"]})
    return content


def excess() -> dict[str, Any]:
    """Objects that claim more than their file holds, or that hide methods of their type."""
    laughs: list = ["ha"]
    for _ in range(60):
        laughs = [laughs, laughs]
    loop: list = []
    loop.append(loop)
    return {
        "a byte array": Call(bytearray, HUGE),
        "a tensor": Call(torch.Tensor, HUGE),
        "many tensors": [Call(torch.Tensor, 2**25) for _ in range(100)],
        "a tensor of one number": {"encoder.weight": torch.zeros(1).expand(HUGE)},
        "a tensor on no device": {"encoder.weight": torch.zeros(HUGE, device="meta")},
        "lists of lists": laughs,
        "weights of lists of lists": {"encoder.weight": laughs},
        "a list of itself": loop,
        "a checkpoint of lists": {"format": 2, "sha256": "", "content": laughs},
        "a checkpoint of itself": {"format": 2, "sha256": "", "content": loop},
        "hidden methods": State({"items": [], "values": 3, "pop": None}),
    }


def containers(content: Any, protocol: int) -> dict[str, bytes]:
    """The content in each container that the readers know."""
    found = {"pickle": pickle.dumps(content, protocol)}
    for name, zipped in (("zip", True), ("2019", False)):
        buffer = io.BytesIO()
        options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
        torch.save(content, buffer, **options)
        found[name] = buffer.getvalue()
    return found


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method, compresslevel=1) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def crafted() -> dict[str, bytes]:
    """Handmade files: bombs, false sizes, files of two kinds at once."""
    one = io.BytesIO()
    torch.save({"encoder.weight": torch.zeros(1, dtype=torch.uint8)}, one)
    with zipfile.ZipFile(one) as file:
        small = {name: file.read(name) for name in file.namelist()}
    bomb = {name: bytes(BOMB) if name.endswith("data/0") else content for name, content in small.items()}
    deflated = zipped(bomb, zipfile.ZIP_DEFLATED)
    head = b"".join(pickle.dumps(part, 2) for part in (MAGIC_NUMBER, PROTOCOL_VERSION, {"little_endian": True}))
    claim = io.BytesIO()
    torch.save({"encoder.weight": torch.zeros(1_000_003)}, claim, _use_new_zipfile_serialization=False)
    claimed = claim.getvalue()[:5000].replace(struct.pack("<I", 1_000_003), struct.pack("<I", 2**31 - 1))
    deep = b"\x80\x02}(X\x06\0\0\0formatK\x02X\x07\0\0\0content)" + b"\x85" * 10**5 + b"u."
    opcodes = {"BINBYTES8": b"\x8e", "BINUNICODE8": b"\x8d", "BYTEARRAY8": b"\x96"}
    return {
        "zip bomb": deflated,
        "zip bomb that lies": deflated.replace(struct.pack("<I", BOMB), struct.pack("<I", 1)),
        "zip of many claims": zipped({**small, **{f"archive/data/{i}": b"" for i in range(1, 5000)}}),
        "2019: huge claim": claimed,
        "2019: huge claim, then a zip": claimed + zipped({"a": b""}),
        "zip without an end": zipped(small)[:-22],
        "a deep tuple": zipped({**small, "archive/data.pkl": deep}),
        "zip within a zip": zipped({"archive/data.pkl": zipped(small), "archive/version": b"3\n"}),
        "marks": b"\x80\x02" + b"(" * 10**5 + b".",
        "2019: marks": head + b"\x80\x02" + b"(" * 10**5 + b".",
        **{f"a huge {name}": b"\x80\x04" + op + struct.pack("<Q", HUGE) + b"x" for name, op in opcodes.items()},
        **{
            f"2019: a huge {name}": head + b"\x80\x04" + op + struct.pack("<Q", 2**62) + b"x."
            for name, op in opcodes.items()
        },
    }


def packed_bomb() -> bytes:
    """BOMB zeros as equal gzip members, so that only one takes time to pack."""
    return gzip.compress(bytes(BOMB // 64), 1) * 64


def images() -> dict[str, bytes]:
    """Files for the reader of IDX files."""
    header = b"\0\0\x08\x03" + struct.pack(">III", 2**31, 2**31, 28)
    return {
        "idx: huge claim": header + bytes(100),
        "idx: bomb": gzip.compress(header) + packed_bomb(),
        "idx: honest bomb": gzip.compress(b"\0\0\x08\x03" + struct.pack(">III", 2**11, 2**10, 2**10)) + packed_bomb(),
    }


def archives() -> dict[str, bytes]:
    """Files for the reader of archives, which extracts the member `x`."""

    def tarred(name: str, kind: bytes) -> bytes:
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, BOMB
        return gzip.compress(info.tobuf(tarfile.GNU_FORMAT)) + packed_bomb() + gzip.compress(bytes(1024))

    return {
        "archive: bomb": zipped({"x": bytes(BOMB)}, zipfile.ZIP_DEFLATED),
        "archive: a huge name": tarred("x", tarfile.GNUTYPE_LONGNAME),
        "archive: a huge header": tarred("x", tarfile.XHDTYPE),
        "archive: a bomb in a tar": tarred("x", tarfile.REGTYPE),
        "archive: a name that leads out": zipped({"../x": b"x", "x": b"x"}),
        "archive: an absolute name": zipped({"/tmp/x": b"x", "x": b"x"}),
    }


def write(folder: Path, trap: Path) -> None:
    """Write all files: NAME.torch, NAME.idx, NAME.archive."""
    files: dict[str, bytes] = {}
    for name, content in code(trap).items():
        for protocol in (0, 2, 4):
            files |= {f"{name}, protocol {protocol}, {kind}.torch": data for kind, data in made(content, protocol)}
    for name, content in excess().items():
        files |= {f"{name}, {kind}.torch": data for kind, data in made(content, 2)}
    files |= {f"{name}.torch": data for name, data in crafted().items()}
    files |= {f"{name}.idx": data for name, data in images().items()}
    files |= {f"{name}.archive": data for name, data in archives().items()}
    for name, data in files.items():
        (folder / name).write_bytes(data)


def made(content: Any, protocol: int) -> list[tuple[str, bytes]]:
    """The containers that can hold the content."""
    try:
        return list(containers(content, protocol).items())
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError, NotImplementedError, RuntimeError):
        return []


def readers(path: Path) -> list[Callable[[], Any]]:
    """All ways of opening a file; each must refuse it with a UserError."""
    if path.suffix == ".idx":
        return [lambda: pixels.read_idx(path, 3)]
    if path.suffix == ".archive":
        return [lambda: archive.extract(path, {"x": "x"}, path.with_suffix(".out"), max_size=1000)]
    model = TrellisLanguageModel(20, 4, 7, 3, output_size=4, weight_norm=False)
    return [
        lambda: weights.load_weights(model, path),
        lambda: checkpoint.load(path),
        lambda: checkpoint.load(path, mmap=True),
    ]


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def child(folder: Path) -> dict[str, Any]:
    """Open all files of `folder` in this process, after limiting its memory."""
    readers(folder / "x.torch")[0]  # so that everything is loaded before the limit
    size = 1024 * _kilobytes("VmSize") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    before, opened, accepted = _kilobytes("VmHWM"), 0, []
    for path in sorted(folder.iterdir()):
        for read in readers(path):
            opened += 1
            try:
                read()
            except UserError:
                continue
            accepted.append(path.name)
    growth = 1024 * (_kilobytes("VmHWM") - before)
    return {"files": len(list(folder.iterdir())), "opened": opened, "accepted": accepted, "bytes": growth}


def run(folder: Path) -> dict[str, Any]:
    """Write the files into `folder` and open them in a child process.

    Returns:
        numbers of files, of attempts to open one (opened) and of files that ran code (executed); names of accepted
        files; bytes by which the child's memory grew.
    """
    trap, files = folder / "trap", folder / "files"
    files.mkdir(parents=True)
    write(files, trap)
    command = [sys.executable, __file__, str(files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [""]
        raise RuntimeError(f"opening hostile files ended with exit code {done.returncode}: {said[0]}")
    return json.loads(done.stdout) | {"executed": int(trap.exists())}


if __name__ == "__main__":
    print(json.dumps(child(Path(sys.argv[1]))))
