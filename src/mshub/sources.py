"""A folder or zip that may hold a model, as one list of files that can be read and copied.

Sources come from strangers: whatever could point elsewhere (links, ``..``, absolute paths) is refused by name or not
followed, and every byte is counted. Which of the files are a model, `mshub.archive` knows.
"""

from __future__ import annotations

import lzma
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from mshub.checksums import CHUNK
from mshub.errors import StoreError

MAX_DEPTH = 8
MAX_WALKED = 200_000  # entries of a local folder: a training tree has thousands, somebody's whole disk has millions
EXPECTED_MODEL = (
    "Expected one folder with dataset.json, plans.json and fold_X/checkpoint_final.pth, as nnU-Net v2 writes it."
)

_INNER_FILES = {".pth", ".pt", ".model", ".pkl", ".json"}
_UNPACK = {
    b"\x1f\x8b": "tar -xzf",
    b"BZh": "tar -xjf",
    b"\xfd7zXZ\x00": "tar -xJf",
    b"\x28\xb5\x2f\xfd": "tar --zstd -xf",
    b"7z\xbc\xaf\x27\x1c": "7z x",
    b"Rar!": "unrar x",
}
_UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError, OverflowError)


@dataclass(frozen=True)
class Source:
    """A listed folder or zip.

    Attributes
    ----------
    path : Path
        The folder or zip.
    files : dict of str to int
        Relative posix path of every regular file, to its size in bytes.
    open : callable
        Opens one of `files`.
    links_out : dict of str to str
        Relative posix path of links that leave the source, to where they lead.
    identity : callable
        Gives two names of one directory the same string.
    """

    path: Path
    files: dict[str, int]
    open: Callable[[str], IO[bytes]]
    links_out: dict[str, str] = field(default_factory=dict)
    identity: Callable[[str], str] = str

    def copy(self, name: str, target: Path) -> None:
        """Copy one of `files` to `target`, whose folder is created; never more bytes than were announced.

        Raises
        ------
        StoreError
            The file is damaged, of another size than announced, packed in an unknown way, or cannot be written.
        """
        try:
            target.parent.mkdir(exist_ok=True)
            copied = self._copy_stream(name, target)
        except NotImplementedError as error:
            raise StoreError(
                f"{self.path.name}: {name} is packed in a way Python cannot read ({error}). Unpack the archive by hand "
                "and pass the model folder."
            ) from error
        except _UNREADABLE as error:
            raise _damaged(self.path.name, f"{name}: {error}") from error
        except OSError as error:
            raise StoreError(
                f"{name} could not be copied to {target} ({error}). Check the disk and permissions."
            ) from error
        if copied != self.files[name]:
            raise _damaged(self.path.name, f"{name}: {copied:,} bytes or more, {self.files[name]:,} announced")

    def _copy_stream(self, name: str, target: Path) -> int:
        copied = 0
        with self.open(name) as stream, target.open("xb") as out:
            while copied <= self.files[name] and (chunk := stream.read(CHUNK)):
                out.write(chunk)
                copied += len(chunk)
        return copied


def listed_folder(path: Path) -> Source:
    """List a folder, at most `MAX_DEPTH` levels below its top and without dotfiles and ``__MACOSX``.

    Raises
    ------
    StoreError
        It cannot be read, or has more than `MAX_WALKED` entries.
    """
    top = Path(os.path.realpath(path))
    files: dict[str, int] = {}
    links_out: dict[str, str] = {}
    try:
        for number, entry in enumerate(_walk(top, (top,))):
            if number >= MAX_WALKED:
                raise StoreError(f"{top} holds over {MAX_WALKED:,} files. Pass the folder of the model itself.")
            name = entry.relative_to(top).as_posix()
            if _leaves(entry, top):
                links_out[name] = os.path.realpath(entry)
            elif entry.is_file():
                files[name] = entry.stat().st_size
    except OSError as error:
        raise StoreError(
            f"{error.filename} cannot be read ({error.strerror}). Make it readable, or pass the model folder itself."
        ) from error
    return Source(
        top, files, lambda name: (top / name).open("rb"), links_out, lambda name: os.path.realpath(top / name)
    )


@contextmanager
def opened_file(path: Path) -> Iterator[Source]:
    """Show one file as a source that holds nothing else.

    Raises
    ------
    StoreError
        It lies inside a model folder.
    """
    refuse_inner_path(path)
    file = path.resolve()
    yield Source(file.parent, {file.name: file.stat().st_size}, lambda _: file.open("rb"))


@contextmanager
def opened_zip(path: Path, max_members: int) -> Iterator[Source]:
    """Open a zip for as long as the context lasts; depth and hidden files as `listed_folder`.

    Raises
    ------
    StoreError
        It is no zip, damaged, has more than `max_members` members, or one of them is unsafe.
    """
    _check_is_zip(path)
    try:
        archive = zipfile.ZipFile(path)
    except (*_UNREADABLE, NotImplementedError, OSError) as error:
        raise _damaged(path.name, error) from error
    with archive:
        infos = archive.infolist()
        if len(infos) > max_members:
            raise StoreError(
                f"{path.name} has {len(infos):,} members; at most {max_members:,} are accepted. Unpack it by hand and "
                "pass the model folder."
            )
        members = _by_safe_name(path.name, infos)
        sizes = {name: info.file_size for name, info in members.items()}
        yield Source(path, sizes, lambda name: archive.open(members[name]))


def refuse_inner_path(path: Path) -> None:
    """Refuse a file or folder that lies inside a model folder.

    Raises
    ------
    StoreError
        Names the model folder to pass instead.
    """
    for parent in Path(os.path.realpath(path)).parents[:3]:
        described = (parent / "dataset.json").is_file() and (parent / "plans.json").is_file()
        v2 = described and any(parent.glob("fold_*/checkpoint_*.pth"))
        v1 = any(any(parent.glob(f"{fold}/model_*.model.pkl")) for fold in ("fold_*", "all"))
        if v1 or v2:
            raise StoreError(f"{path} is only a part of a model. Pass the whole model folder: {parent}")


def _walk(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Yield everything below `folder`, following links that stay inside the top, `above[0]`, and make no loop."""
    for entry in sorted(folder.iterdir()):
        if _hidden(entry.name):
            continue
        yield entry
        real = Path(os.path.realpath(entry))
        if entry.is_dir() and not _leaves(entry, above[0]) and real not in above and len(above) <= MAX_DEPTH + 1:
            yield from _walk(entry, (*above, real))


def _leaves(entry: Path, top: Path) -> bool:
    return not Path(os.path.realpath(entry)).is_relative_to(top)


def _hidden(name: str) -> bool:
    return any(part == "__MACOSX" or part.startswith(".") for part in PurePosixPath(name).parts)


def _check_is_zip(path: Path) -> None:
    # A checkpoint is a zip by content too, so its name decides.
    if path.suffix.lower() in _INNER_FILES:
        refuse_inner_path(path)
        bare = path.suffix.lower() == ".model"
        plan = " Weights of nnU-Net v1 by themselves need a [plan] in the model's card." if bare else ""
        raise StoreError(f"{path} is a single file. {EXPECTED_MODEL} Pass that folder, or a zip of it.{plan}")
    if not path.is_file():
        raise StoreError(
            f"{path} is neither a folder nor a regular file. {EXPECTED_MODEL} Pass that folder, or a zip of it."
        )
    if zipfile.is_zipfile(path):
        return
    head = _head(path)
    if head.startswith(b"PK\x03\x04"):
        raise _damaged(path.name, "its end is missing")
    commands = [command for magic, command in _UNPACK.items() if head.startswith(magic)]
    command = "tar -xf" if head[257:262] == b"ustar" else next(iter(commands), None)
    if command:
        raise StoreError(f"{path.name} is no zip. Unpack it with `{command} {path.name}` and pass the folder.")
    raise StoreError(f"{path.name} is neither a folder nor a zip. {EXPECTED_MODEL} Pass that folder, or a zip of it.")


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(512)
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from error


def _by_safe_name(archive: str, infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        reason = _unsafe(info)
        name = str(PurePosixPath(info.filename))
        if not reason and not info.is_dir() and name in members:
            reason = "occurs twice"
        if reason:
            raise StoreError(
                f"{archive}: member {info.orig_filename!r} {reason}. Expected plain files with relative names. Nothing "
                "was written: get the archive from its makers again, or unpack it by hand and pass the model folder."
            )
        if not info.is_dir() and not _hidden(name) and name.count("/") <= MAX_DEPTH + 1:
            members[name] = info
    return members


def _unsafe(info: zipfile.ZipInfo) -> str | None:
    """Say what is wrong with a zip member, judged by the name as stored, before zipfile tidied it."""
    name, kind = info.orig_filename, stat.S_IFMT(info.external_attr >> 16)
    problems = {
        "has a NUL character in its name": "\0" in name,
        "has a backslash in its name": "\\" in name,
        "has an absolute path": name.startswith("/"),
        "has a drive letter": bool(re.match(r"[A-Za-z]:", name)),
        "leaves its folder with '..'": ".." in name.split("/"),
        "is a symbolic link": kind == stat.S_IFLNK,
        "is a special file": kind not in (0, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK),
        "is encrypted": bool(info.flag_bits & 0x1),
    }
    return next((problem for problem, found in problems.items() if found), None)


def _damaged(name: str, reason: object) -> StoreError:
    return StoreError(
        f"{name} cannot be read as a zip ({reason}). It is probably an incomplete or damaged download: fetch it again."
    )
