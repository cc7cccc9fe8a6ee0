"""What a pickle unfolds to, told from its instructions before any of them is carried out.

Two lists that hold one list twice, and so on forty times, are a hundred bytes; hashing or writing them takes 2**40
steps. A number in a pickle can ask Python for room for 2**31 memories. Neither is ever in a model.
"""

from __future__ import annotations

import pickletools
import tarfile
import zipfile
from pathlib import Path
from typing import IO, Any

from mshub.errors import ModelFolderError

MAX_STEPS = 20_000_000  # the log of 4000 epochs with 100 classes takes 6 million
MAX_VALUES = 50_000_000

_PICKLES_OF_OLD_CHECKPOINTS = 5  # magic number, protocol, system, content, keys; then come the weights
_KEPT = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}  # change what they are called on
_GROWTH = 4  # of what `_codecs.encode` is called on: hex doubles it, quoted-printable makes three of one
_MARK = pickletools.markobject


def check_torch_file(path: Path) -> None:
    """Refuse a file for `torch.load` that is small and unfolds to more than memory or patience hold.

    Raises
    ------
    ModelFolderError
        It is a zip with compressed members, which torch's own never has, or has a pickle that `check_pickle` refuses.
    """
    if not zipfile.is_zipfile(path):
        _check_old_torch_file(path)
        return
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.lower(): info for info in archive.infolist()}  # torch ignores case
        if len(members) < len(archive.infolist()) or any(map(_is_compressed, members.values())):
            raise ModelFolderError(
                f"{path.name} was not loaded: it has members that are compressed or occur twice. torch writes none: "
                "ask the model's makers for the file nnU-Net itself wrote."
            )
        for name, info in members.items():
            if name.endswith("/data.pkl"):
                with archive.open(info) as stream:
                    check_pickle(stream, path.name)


def _is_compressed(info: zipfile.ZipInfo) -> bool:
    return info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size


def _check_old_torch_file(path: Path) -> None:
    if tarfile.is_tarfile(path):
        return  # torch's oldest format, which it refuses
    with path.open("rb") as stream:
        if stream.read(4) == b"PK\x03\x04":
            return  # a zip without its end, which torch refuses
        stream.seek(0)
        for _ in range(_PICKLES_OF_OLD_CHECKPOINTS):
            check_pickle(stream, path.name)


def check_pickle(stream: IO[bytes], name: str, max_steps: int = MAX_STEPS) -> None:
    """Refuse a pickle that unfolds to too much.

    Raises
    ------
    ModelFolderError
        It takes over `max_steps` to read, holds over `MAX_VALUES` counting what is there twice twice, or numbers what
        it remembers as no program does.
    ValueError, LookupError, TypeError
        It is damaged.
    """
    # The stack and the memory of an unpickler, with sizes in place of values.
    stack: list[Any] = []
    memory: dict[int, Any] = {}
    argument: Any
    for step, (code, argument, _) in enumerate(pickletools.genops(stream)):
        if step > max_steps:
            raise _too_much(name, f"takes over {max_steps:,} steps to read")
        if code.name in ("BINPUT", "LONG_BINPUT", "MEMOIZE", "PUT"):
            place = len(memory) if argument is None else argument
            if place > step:
                raise _too_much(name, f"remembers its value number {step:,} as number {place:,}")
            memory[place] = stack[-1]
        elif code.name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memory[argument])
        elif code.name in ("DUP", "MARK"):
            stack.append(stack[-1] if code.name == "DUP" else _MARK)
        elif _step(stack, code, argument) > MAX_VALUES:
            raise _too_much(name, f"unfolds to over {MAX_VALUES:,} values")


def _step(stack: list[Any], code: pickletools.OpcodeInfo, argument: Any) -> int:
    """Do to the stack what any other instruction does; returns the size of what it leaves there."""
    taken = _taken(stack, code.stack_before) if code.stack_before else []
    if not code.stack_after:
        return 0
    kept = taken.pop(0) if code.name in _KEPT else [1, argument == "_codecs encode"]
    if taken:
        kept[0] += sum(size for size, _ in taken) * (_GROWTH if code.name == "REDUCE" and taken[0][1] else 1)
    elif isinstance(argument, (str, bytes)):
        kept[0] += len(argument)
    stack.append(kept)
    return int(kept[0])


def _taken(stack: list[Any], before: list[Any]) -> list[Any]:
    above: list[Any] = []
    count = len(before)
    if _MARK in before:
        count = before.index(_MARK)
        while (value := stack.pop()) is not _MARK:
            above.append(value)
    below = [stack.pop() for _ in range(count)]
    return below[::-1] + above


def _too_much(name: str, what: str) -> ModelFolderError:
    return ModelFolderError(
        f"{name} was not read: it {what}. Files of nnU-Net do not: ask the model's makers for what nnU-Net itself "
        "wrote."
    )
