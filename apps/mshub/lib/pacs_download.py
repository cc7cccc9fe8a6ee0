"""The files of a series from a PACS: all it lists, each once, or none."""

from __future__ import annotations

import filecmp
from collections.abc import Callable, Mapping
from pathlib import Path

from pydicom.dataset import Dataset

from lib.pacs_client import PacsClient
from lib.pacs_errors import PacsError


def download(
    client: PacsClient,
    study: str,
    series: str,
    folder: Path,
    expected: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the files of a series to `folder`, which does not exist yet.

    What was sent is compared with the list of instances, asked for last: nothing that arrived meanwhile is overlooked.

    Parameters
    ----------
    expected : int
        So many instances the series has, by the list of series; 0 if that does not say.

    Raises
    ------
    PacsError
        The PACS does not answer, or sends anything else than it lists.
    """
    folder.mkdir(parents=True)
    files: dict[str, Path] = {}
    kinds: dict[str, str] = {}
    for number, dataset in enumerate(client.files(study, series), 1):
        uid, path = _identity(dataset, series), _file_of(dataset, folder, number)
        _write(dataset, path)
        if uid not in files:
            files[uid], kinds[uid] = path, str(dataset.get("SOPClassUID") or "")
        elif filecmp.cmp(path, files[uid], shallow=False):
            path.unlink()
        else:
            raise _unlike(f"sent two different instances {uid}", "each once")
        progress(len(files), expected)
    _check_all(series, expected, kinds, client.instance_classes(study, series))


def _check_all(series: str, expected: int, sent: Mapping[str, str], listed: Mapping[str, str]) -> None:
    """Refuse what was sent (SOPInstanceUID -> SOPClassUID) if it is not what the PACS lists."""
    most = max(expected, len(listed))
    if not most or len(sent) < expected or not sent.keys() >= listed.keys():
        here = len(sent.keys() & listed.keys()) if listed else len(sent)
        raise _unlike(f"lists {most} instances of the series {series} and sent {here}", "all of them")
    if expected and len(sent) > most:
        raise _unlike(f"lists {most} instances of the series {series} and sent {len(sent)}", "those it lists")
    for uid in listed:
        if listed[uid] and listed[uid] != sent[uid]:
            raise _unlike(f"lists {uid} as {listed[uid]} and sent {sent[uid] or 'no class'}", "the same")


def _identity(dataset: Dataset, series: str) -> str:
    """Return the SOPInstanceUID of what was sent, if it belongs to the series."""
    uid, found = str(dataset.get("SOPInstanceUID") or ""), str(dataset.get("SeriesInstanceUID") or "")
    if not uid or found != series:
        raise _unlike(f"sent an instance of the series {found or 'without UID'}", f"those of {series}")
    return uid


def _write(dataset: Dataset, path: Path) -> None:
    try:
        dataset.save_as(str(path), write_like_original=False)
    except OSError:  # the disk is full
        raise
    except Exception as error:  # pydicom promises no exception type for what is damaged
        raise PacsError(
            f"The PACS sent an instance that cannot be stored ({error}). Expected: complete DICOM objects. How to fix: "
            "try again; if it stays so, look for damaged instances in the PACS."
        ) from error


def _unlike(found: str, expected: str) -> PacsError:
    return PacsError(
        f"The PACS {found}. Expected: {expected}. How to fix: try again, once all of the series has arrived there; if "
        "it stays so, look for damaged instances in the PACS."
    )


def _file_of(dataset: Dataset, folder: Path, number: int) -> Path:
    """Return the file to write an instance to, by the number people know it by: messages name it."""
    name = f"image {dataset.get('InstanceNumber')}"
    path = folder / name
    return path if name.removeprefix("image ").isdecimal() and not path.exists() else folder / f"file {number}"
