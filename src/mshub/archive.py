"""Find an nnU-Net v2 trained-model folder in whatever a user hands over, and copy its files out of there.

The source may be a folder or a zip, with any sane nesting around the model; a folder that holds nothing but one zip is
read as that zip. A *model root* is a directory with ``dataset.json``, ``plans.json`` and at least one
``fold_X/checkpoint_*.pth`` (X a number or ``all``).

Sources come from strangers. Only the listed members of one model root are written, under names built from the list and
never from the archive; every byte is counted; whatever could point elsewhere (links, ``..``, absolute paths) is refused
by name. Nothing here opens a checkpoint.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from mshub.errors import ModelFolderError, MSHubError, StoreError

MAX_BYTES = 64 * 1024**3
MAX_MEMBERS = 10_000
MAX_DEPTH = 8
MAX_WALKED = 200_000  # entries of a local folder: a training tree has thousands, somebody's whole disk has millions
CHUNK = 1024 * 1024

_CHECKPOINT = re.compile(r"(?P<root>.*?)/?(?P<fold>fold_(?:\d+|all))/checkpoint_[^/]+\.pth")
_MEMBER = re.compile(
    r"(?:dataset|plans|dataset_fingerprint)\.json|(?:LICENSE|README)[^/]*|"
    r"fold_(?:\d+|all)/checkpoint_(?P<checkpoint>final|best)\.pth"
)
_TEXT = re.compile(r"(?:LICENSE|README).*|.*\.(?:txt|md|pdf|docx)")
_FOLD = re.compile(r"fold_(?:\d+|all)")
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
_EXPECTED = (
    "Expected one folder with dataset.json, plans.json and fold_X/checkpoint_final.pth, as nnU-Net v2 writes it."
)


def find_model_roots(source: Path) -> list[str]:
    """Return the model roots in a folder or zip.

    Parameters
    ----------
    source : Path
        Folder or zip; searched at most `MAX_DEPTH` levels deep, without dotfiles and ``__MACOSX``.

    Returns
    -------
    list of str
        Relative posix paths, outermost first, ``"."`` for the top; empty if there is none.

    Raises
    ------
    StoreError
        The source does not exist, lies inside a model folder, or is an archive that is damaged, unsafe or no zip.
    """
    with _opened(source, MAX_MEMBERS) as tree:
        return _roots(tree)


def extract_model(
    source: Path, target: Path, *, root: str | None = None, max_bytes: int = MAX_BYTES, max_members: int = MAX_MEMBERS
) -> str:
    """Copy one model's files from a folder or zip.

    Copied are ``dataset.json``, ``plans.json``, ``dataset_fingerprint.json``, ``LICENSE*``, ``README*`` and, of every
    fold, ``checkpoint_final.pth``; ``checkpoint_best.pth`` only if no fold has a final one.

    Parameters
    ----------
    source : Path
        Folder or zip.
    target : Path
        Existing empty directory. It is empty again if anything fails.
    root : str, optional
        Which model root to take, where the source holds several.
    max_bytes : int
        Refuse to write more than this.
    max_members : int
        Refuse a zip with more members than this.

    Returns
    -------
    str
        The chosen root, relative to `source`.

    Raises
    ------
    ModelFolderError
        No usable model in `source`, or several and no `root`.
    StoreError
        `source` is unsafe, damaged, too large for the limits or the disk, or lies inside a model folder; `target` is
        not an empty directory.
    """
    if not target.is_dir() or any(target.iterdir()):
        raise StoreError(f"{target} is not an empty directory. Expected an existing, empty one to copy the model into.")
    with _opened(source, max_members) as tree:
        chosen = _chosen_root(tree, root)
        members = _members(tree, chosen)
        _check_size(sum(tree.files[name] for name in members.values()), target, max_bytes)
        try:
            for relative, name in members.items():
                _copy(tree, name, target / relative)
        except BaseException:
            _clear(target)
            raise
    return chosen


def tree_sha256(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below `folder`.

    Returns
    -------
    dict of str to str
        Relative posix path to hex digest, sorted by path.

    Raises
    ------
    StoreError
        There is no such folder, or it holds a link or an unreadable file.
    """
    if not folder.is_dir():
        raise StoreError(f"{folder} is no folder. Expected a folder whose files can be hashed.")
    digests = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise StoreError(f"{path} is a link. Expected plain files only: replace it by the file it points to.")
        if path.is_file():
            digests[path.relative_to(folder).as_posix()] = file_sha256(path)
    return dict(sorted(digests.items()))


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file, read in chunks.

    Raises
    ------
    StoreError
        The file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}). Check its permissions and the disk.") from error
    return digest.hexdigest()


# -- sources ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tree:
    """A listed source.

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


@contextmanager
def _opened(source: Path, max_members: int) -> Iterator[_Tree]:
    if not source.exists():
        raise StoreError(f"{source} does not exist. Expected the folder or zip of an nnU-Net v2 model.")
    folder = _listed_folder(source) if source.is_dir() else None
    if folder and not _roots(folder):
        _refuse_inner_path(source)
    archive = _only_zip(folder) if folder else source
    if folder and (_roots(folder) or not archive):
        yield folder
    elif archive:
        with _opened_zip(archive, max_members) as tree:
            yield tree


def _listed_folder(path: Path) -> _Tree:
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
    return _Tree(top, files, lambda name: (top / name).open("rb"), links_out, lambda name: os.path.realpath(top / name))


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


@contextmanager
def _opened_zip(path: Path, max_members: int) -> Iterator[_Tree]:
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
        yield _Tree(path, sizes, lambda name: archive.open(members[name]))


def _only_zip(folder: _Tree) -> Path | None:
    """Return the zip in a folder that holds just one, such as a shared folder somebody uploaded an archive to."""
    others = [name for name in folder.files if not _TEXT.fullmatch(PurePosixPath(name).name)]
    return folder.path / others[0] if len(others) == 1 and others[0].lower().endswith(".zip") else None


def _hidden(name: str) -> bool:
    return any(part == "__MACOSX" or part.startswith(".") for part in PurePosixPath(name).parts)


# -- refusals ---------------------------------------------------------------------------------------------------------


def _check_is_zip(path: Path) -> None:
    # A checkpoint is a zip by content too, so its name decides.
    if path.suffix.lower() in _INNER_FILES:
        _refuse_inner_path(path)
        raise StoreError(f"{path} is a single file. {_EXPECTED} Pass that folder, or a zip of it.")
    if not path.is_file():
        raise StoreError(
            f"{path} is neither a folder nor a regular file. {_EXPECTED} Pass that folder, or a zip of it."
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
    raise StoreError(f"{path.name} is neither a folder nor a zip. {_EXPECTED} Pass that folder, or a zip of it.")


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(512)
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from error


def _refuse_inner_path(path: Path) -> None:
    for parent in Path(os.path.realpath(path)).parents[:3]:
        checkpoints = parent.glob("fold_*/checkpoint_*.pth")
        if (parent / "dataset.json").is_file() and (parent / "plans.json").is_file() and any(checkpoints):
            raise StoreError(f"{path} is only a part of a model. Pass the whole model folder: {parent}")


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


def _check_size(size: int, target: Path, max_bytes: int) -> None:
    if size > max_bytes:
        raise StoreError(
            f"The model unpacks to {size:,} bytes; at most {max_bytes:,} are accepted. Nothing was written: check that "
            "this is the archive you meant."
        )
    free = shutil.disk_usage(target).free
    if size > free:
        raise StoreError(
            f"The model needs {size:,} bytes and {target} has {free:,} free. Nothing was written: make room, or point "
            "MSHUB_HOME to a larger disk."
        )


# -- the model in it --------------------------------------------------------------------------------------------------


def _roots(tree: _Tree) -> list[str]:
    matches = (_CHECKPOINT.fullmatch(name) for name in tree.files)
    candidates = {match["root"] or "." for match in matches if match}
    found = [
        root for root in candidates if {_join(root, "dataset.json"), _join(root, "plans.json")} <= tree.files.keys()
    ]
    # A link to a model beside it is the same model.
    unique: dict[str, str] = {}
    for root in sorted(found, key=lambda root: (root.count("/"), root)):
        unique.setdefault(tree.identity(root), root)
    return list(unique.values())


def _join(root: str, name: str) -> str:
    return name if root == "." else f"{root}/{name}"


def _chosen_root(tree: _Tree, root: str | None) -> str:
    roots = _roots(tree)
    if not roots:
        raise _no_model(tree)
    listed = "\n".join(f"  {name}" for name in roots)
    if root is not None:
        wanted = str(PurePosixPath(root))
        if wanted not in roots:
            raise ModelFolderError(f"{tree.path} has no model in {root!r}. It has:\n{listed}\nChoose one with --root.")
        return wanted
    if len(roots) > 1:
        raise ModelFolderError(f"{tree.path} holds {len(roots)} models:\n{listed}\nChoose one with --root.")
    return roots[0]


def _members(tree: _Tree, root: str) -> dict[str, str]:
    """Return what to copy: path below the model root -> name in the tree."""
    prefix = "" if root == "." else f"{root}/"
    _check_links(tree, prefix)
    relative = {name[len(prefix) :]: name for name in tree.files if name.startswith(prefix)}
    matches = {name: match for name in relative if (match := _MEMBER.fullmatch(name))}
    kinds = {match["checkpoint"] for match in matches.values()} - {None}
    if not kinds:
        raise ModelFolderError(
            f"{tree.path} has neither checkpoint_final.pth nor checkpoint_best.pth in any fold of {root!r}. Expected a "
            "finished training: run it to its end, or ask the model's makers."
        )
    wanted = {None, "final" if "final" in kinds else "best"}
    return {name: relative[name] for name, match in matches.items() if match["checkpoint"] in wanted}


def _check_links(tree: _Tree, prefix: str) -> None:
    """Refuse a model of which a needed part is a link out of the source: leaving it out would change the ensemble."""
    for name, destination in tree.links_out.items():
        relative = name[len(prefix) :] if name.startswith(prefix) else ""
        if _MEMBER.fullmatch(relative) or _FOLD.fullmatch(relative):
            raise _outside(tree, name, destination)


def _outside(tree: _Tree, name: str, destination: str) -> StoreError:
    return StoreError(
        f"{tree.path / name} is a link to {destination}, outside the given folder. Expected everything inside it: "
        "replace the link by a copy, or pass a folder that holds both."
    )


def _no_model(tree: _Tree) -> MSHubError:
    names = sorted(tree.files, key=lambda name: (name.count("/"), name))
    if tree.links_out and not names:
        return _outside(tree, *next(iter(tree.links_out.items())))
    more = f"\n  ... and {len(names) - 10} more" if len(names) > 10 else ""
    links = "".join(f"\n  {name} -> {to} (a link that leaves it: not followed)" for name, to in tree.links_out.items())
    seen = "".join(f"\n  {name}" for name in names[:10]) + more + links or " nothing"
    return ModelFolderError(f"{tree.path} holds no nnU-Net v2 model. {_diagnosis(names)} Found:{seen}")


def _diagnosis(names: list[str]) -> str:
    """Say what the files look like instead, and what to do about it."""
    basenames = {PurePosixPath(name).name for name in names}
    folders = {part for name in names for part in PurePosixPath(name).parts[:-1]}
    if "plans.pkl" in basenames and any(re.fullmatch(r"model_.*\.model", name) for name in basenames):
        return "It is a model of nnU-Net v1 (plans.pkl, model_*_checkpoint.model): importing v1 is not supported yet."
    if {"imagesTr", "labelsTr"} & folders:
        return f"It looks like a raw dataset (imagesTr, labelsTr), not a trained model. {_EXPECTED}"
    if "gt_segmentations" in folders or "nnUNetPlans.json" in basenames:
        return f"It looks like a preprocessed dataset, not a trained model. {_EXPECTED}"
    if any(_CHECKPOINT.fullmatch(name) for name in names):
        missing = " and ".join(sorted({"dataset.json", "plans.json"} - basenames)) or "dataset.json or plans.json"
        return f"There are checkpoints, but {missing} is missing beside the fold folders. {_EXPECTED}"
    if {"dataset.json", "plans.json"} <= basenames:
        return f"The weights are missing: no fold_X/checkpoint_*.pth beside plans.json. {_EXPECTED}"
    if any(name.lower().endswith(".zip") for name in basenames):
        return f"It holds several zips: pass one of them. {_EXPECTED}"
    return _EXPECTED


# -- copying ----------------------------------------------------------------------------------------------------------


def _copy(tree: _Tree, name: str, target: Path) -> None:
    try:
        target.parent.mkdir(exist_ok=True)
        copied = _copy_stream(tree, name, target)
    except NotImplementedError as error:
        raise StoreError(
            f"{tree.path.name}: {name} is packed in a way Python cannot read ({error}). Unpack the archive by hand and "
            "pass the model folder."
        ) from error
    except _UNREADABLE as error:
        raise _damaged(tree.path.name, f"{name}: {error}") from error
    except OSError as error:
        raise StoreError(
            f"{name} could not be copied to {target} ({error}). Check the disk and permissions."
        ) from error
    if copied != tree.files[name]:
        raise _damaged(tree.path.name, f"{name}: {copied:,} bytes or more, {tree.files[name]:,} announced")


def _copy_stream(tree: _Tree, name: str, target: Path) -> int:
    copied = 0
    with tree.open(name) as stream, target.open("xb") as out:
        while copied <= tree.files[name] and (chunk := stream.read(CHUNK)):
            out.write(chunk)
            copied += len(chunk)
    return copied


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
