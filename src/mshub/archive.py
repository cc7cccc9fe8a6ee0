"""Find an nnU-Net trained-model folder in whatever a user hands over, and copy its files out of there.

The source may be a folder or a zip, with any sane nesting around the model; a folder that holds nothing but one zip is
read as that zip. A *model root* is a directory with ``dataset.json``, ``plans.json`` and at least one
``fold_X/checkpoint_*.pth`` (X a number or ``all``), as nnU-Net v2 writes it, or one with at least one
``fold_X/model_*.model`` or ``all/model_*.model`` beside its ``.model.pkl``, as v1 did.

Only the listed members of one model root are written, under names built from the list and never from the archive; see
`mshub.sources` for what is refused before. Nothing here opens a checkpoint.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from mshub.errors import ModelFolderError, MSHubError, StoreError
from mshub.model_layouts import STATE_SUFFIXES, V1, V2, Layout
from mshub.sources import EXPECTED_MODEL, Source, listed_folder, opened_file, opened_zip, refuse_inner_path

__all__ = [
    "MAX_BYTES",
    "MAX_MEMBERS",
    "extract_model",
    "extract_state",
    "find_model_roots",
]

MAX_BYTES = 64 * 1024**3
MAX_MEMBERS = 10_000

_TEXT = re.compile(r"(?:LICENSE|README).*|.*\.(?:txt|md|pdf|docx)")


def find_model_roots(source: Path) -> list[str]:
    """Return the model roots in a folder or zip.

    Parameters
    ----------
    source : Path
        Folder or zip; searched at most `mshub.sources.MAX_DEPTH` levels deep, without dotfiles and ``__MACOSX``.

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
    fold, ``checkpoint_final.pth``; ``checkpoint_best.pth`` only if no fold has a final one. Of a model of nnU-Net v1:
    ``plans.pkl``, ``postprocessing.json``, ``LICENSE*``, ``README*`` and ``model_final_checkpoint.model`` (or
    ``model_best.model``) with its ``.model.pkl``.

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
                tree.copy(name, target / relative)
        except BaseException:
            _clear(target)
            raise
    return chosen


def extract_state(source: Path, target: Path) -> bool:
    """Copy a bare state file, weights of nnU-Net v1 without their plans.

    Parameters
    ----------
    source : Path
        The file itself, or a folder or zip that holds no model, and one such file.
    target : Path
        File to write.

    Returns
    -------
    bool
        False, and nothing is written, where `source` holds something else.

    Raises
    ------
    StoreError
        As `extract_model`.
    """
    is_state = _is_state(source)
    with opened_file(source) if is_state else _opened(source, MAX_MEMBERS) as tree:
        states = list(tree.files) if is_state else _states(tree)
        if len(states) != 1:
            return False
        _check_size(tree.files[states[0]], target.parent, MAX_BYTES)
        tree.copy(states[0], target)
    return True


def _states(tree: Source) -> list[str]:
    return [] if _roots(tree) else [name for name in tree.files if name.lower().endswith(STATE_SUFFIXES)]


def _is_state(path: Path) -> bool:
    """Return whether a file is what torch saved, by its name or as a zip with torch's own members."""
    if not path.is_file():
        return False
    if path.suffix.lower() in STATE_SUFFIXES:
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return any(PurePosixPath(name).parts[1:] == ("data.pkl",) for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


@contextmanager
def _opened(source: Path, max_members: int) -> Iterator[Source]:
    if not source.exists():
        raise StoreError(f"{source} does not exist. Expected the folder or zip of an nnU-Net model.")
    folder = listed_folder(source) if source.is_dir() else None
    if folder and not _roots(folder):
        refuse_inner_path(source)
    archive = _only_zip(folder) if folder else source
    if folder and not archive:
        yield folder
    elif archive:
        with opened_zip(archive, max_members) as tree:
            yield tree


def _only_zip(folder: Source) -> Path | None:
    """Return the zip in a folder that holds just one, such as a shared folder somebody uploaded an archive to."""
    others = [name for name in folder.files if not _TEXT.fullmatch(PurePosixPath(name).name)]
    return folder.path / others[0] if len(others) == 1 and others[0].lower().endswith(".zip") else None


def _roots(tree: Source) -> list[str]:
    found = [root for layout in (V2, V1) for root in _roots_of(tree, layout)]
    # A link to a model beside it is the same model.
    unique: dict[str, str] = {}
    for root in sorted(found, key=lambda root: (root.count("/"), root)):
        unique.setdefault(tree.identity(root), root)
    return list(unique.values())


def _roots_of(tree: Source, layout: Layout) -> list[str]:
    matches = (layout.checkpoint.fullmatch(name) for name in tree.files)
    candidates = {match["root"] or "." for match in matches if match}
    return [root for root in candidates if {_join(root, name) for name in layout.required} <= tree.files.keys()]


def _join(root: str, name: str) -> str:
    return name if root == "." else f"{root}/{name}"


def _chosen_root(tree: Source, root: str | None) -> str:
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


def _members(tree: Source, root: str) -> dict[str, str]:
    """Return what to copy: path below the model root -> name in the tree."""
    layout = V2 if root in _roots_of(tree, V2) else V1
    prefix = "" if root == "." else f"{root}/"
    _check_links(tree, prefix, layout)
    relative = {name[len(prefix) :]: name for name in tree.files if name.startswith(prefix)}
    matches = {name: match for name in relative if (match := layout.member.fullmatch(name))}
    kinds = {match["checkpoint"] for match in matches.values()} - {None}
    if not kinds:
        raise ModelFolderError(
            f"{tree.path} has neither {layout.final} nor {layout.best} in any fold of {root!r}. Expected a finished "
            "training: run it to its end, or ask the model's makers."
        )
    wanted = {None} | (kinds - {"best"} or kinds)
    return {name: relative[name] for name, match in matches.items() if match["checkpoint"] in wanted}


def _check_links(tree: Source, prefix: str, layout: Layout) -> None:
    """Refuse a model of which a needed part is a link out of the source: leaving it out would change the ensemble."""
    for name, destination in tree.links_out.items():
        relative = name[len(prefix) :] if name.startswith(prefix) else ""
        if layout.member.fullmatch(relative) or layout.fold.fullmatch(relative):
            raise _outside(tree, name, destination)


def _outside(tree: Source, name: str, destination: str) -> StoreError:
    return StoreError(
        f"{tree.path / name} is a link to {destination}, outside the given folder. Expected everything inside it: "
        "replace the link by a copy, or pass a folder that holds both."
    )


def _no_model(tree: Source) -> MSHubError:
    names = sorted(tree.files, key=lambda name: (name.count("/"), name))
    if tree.links_out and not names:
        return _outside(tree, *next(iter(tree.links_out.items())))
    more = f"\n  ... and {len(names) - 10} more" if len(names) > 10 else ""
    links = "".join(
        f"\n  {_in_a_line(name)} -> {_in_a_line(to)} (a link that leaves it: not followed)"
        for name, to in list(tree.links_out.items())[:10]
    )
    seen = "".join(f"\n  {_in_a_line(name)}" for name in names[:10]) + more + links or " nothing"
    return ModelFolderError(f"{tree.path} holds no nnU-Net model. {_diagnosis(names)} Found:{seen}")


def _in_a_line(name: str) -> str:
    """Return a name as it may stand in a list: one with a line break would forge the next line."""
    return name if name.isprintable() else ascii(name)


def _diagnosis(names: list[str]) -> str:
    """Say what the files look like instead, and what to do about it."""
    basenames = {PurePosixPath(name).name for name in names}
    folders = {part for name in names for part in PurePosixPath(name).parts[:-1]}
    if any(name.endswith(".model") for name in basenames):
        return (
            "There are weights of nnU-Net v1, but model_final_checkpoint.model.pkl, which says whose they are, is not "
            "beside them in fold_X or all. Expected the folder nnU-Net v1 wrote: ask the model's makers for it, or "
            "write what its plans say into the card of the model, as [plan]."
        )
    if {"imagesTr", "labelsTr"} & folders:
        return f"It looks like a raw dataset (imagesTr, labelsTr), not a trained model. {EXPECTED_MODEL}"
    if "gt_segmentations" in folders or "nnUNetPlans.json" in basenames:
        return f"It looks like a preprocessed dataset, not a trained model. {EXPECTED_MODEL}"
    if any(V2.checkpoint.fullmatch(name) for name in names):
        missing = " and ".join(sorted({"dataset.json", "plans.json"} - basenames)) or "dataset.json or plans.json"
        return f"There are checkpoints, but {missing} is missing beside the fold folders. {EXPECTED_MODEL}"
    if {"dataset.json", "plans.json"} <= basenames:
        return f"The weights are missing: no fold_X/checkpoint_*.pth beside plans.json. {EXPECTED_MODEL}"
    if any(name.lower().endswith(".zip") for name in basenames):
        return f"It holds several zips: pass one of them. {EXPECTED_MODEL}"
    return EXPECTED_MODEL


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


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
