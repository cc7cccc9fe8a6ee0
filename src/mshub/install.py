"""Bring a model into the store: unpack, inspect, check against its card, publish.

This is the one place where the archive, the card, the nnU-Net folder and the store meet.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import mshub
from mshub.archive import extract_model, extract_state
from mshub.bundled import sample_data
from mshub.catalogue import Catalogue, ModelCard, draft_card, dump_card, load_card
from mshub.checksums import file_sha256
from mshub.errors import CatalogueError, LabelError, ModelFolderError, ModelNotAvailable, StoreError
from mshub.fetch import fetch_weights
from mshub.nnunet.engine import check_weights
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.trusted import make_plain
from mshub.nnunet.v1_conversion import convert_v1_folder, convert_v1_state
from mshub.nnunet.v1_files import is_v1_folder
from mshub.store import ModelStore, ModelVersion, writable_folder

STATE = "state.model"  # what a bare state file is called while it is converted
DownloadProgress = Callable[[int, int | None], None]
"""Called with (bytes so far, bytes in all or None)."""


def add_model(
    store: ModelStore,
    model_id: str,
    source: Path,
    *,
    card_path: Path | None = None,
    root: str | None = None,
    origin: Mapping[str, str] | None = None,
    licence: str | None = None,
    trust: bool = False,
) -> ModelVersion:
    """Install a model from a folder or zip.

    Parameters
    ----------
    store : ModelStore
    model_id : str
        An id of the catalogue, or a new one for a lab's own model.
    source : Path
        Folder or zip that holds the nnU-Net model at any sane depth. A model of nnU-Net v1 is converted; of one whose
        card has a plan, the bare state file is enough.
    card_path : Path, optional
        Card of a lab's own model; drafted from ``dataset.json`` when absent.
    root : str, optional
        Which model inside `source`, where there are several.
    origin : mapping, optional
        Where `source` came from, for the record; default: the name of the file or folder, and the sha256 of a file.
    licence : str, optional
        Terms of use, for the record; default: those of the card, else the first line of the model's licence file.
    trust : bool
        Open files that hold Python code, **and run it**: see `mshub.nnunet.trusted`.

    Returns
    -------
    ModelVersion
        The installed version; the existing one when the same files are installed already.

    Raises
    ------
    CatalogueError, StoreError, ModelFolderError, LabelError
        Nothing is installed.
    """
    known = store.catalogue()
    card = _chosen_card(known, model_id, card_path)
    with store.staging() as staging:
        model, facts = _unpacked(source, staging, card, root, trust)
        folder = ModelFolder.open(model)
        card = _with_licence(card or _drafted_card(model_id, folder), licence, model)
        _check_against_card(folder, card)
        check_weights(folder)
        record = version_record(folder, card, origin or origin_of(source))
        version = store.publish(model_id, model, record | facts)
    if card_path or model_id not in known:
        store.keep_card(card)
    return version


def origin_of(source: Path, page: str | None = None) -> dict[str, str]:
    """Return what a version's record says of where its weights come from.

    Parameters
    ----------
    source : Path
        Folder or file they were added from; of a file, the sha256 is noted.
    page : str, optional
        Where a person has them from.
    """
    origin = {"how": "added", "from": page or source.name}
    return origin | ({"sha256": file_sha256(source)} if source.is_file() else {})


def fetch_model(store: ModelStore, model_id: str, progress: DownloadProgress | None = None) -> ModelVersion:
    """Download the weights a card points to, or take those that come with MSHub, and install them.

    Weights that were fetched before are not fetched again. A broken download is kept in the store's ``downloads``
    folder, for the next try to resume.

    Raises
    ------
    ModelNotAvailable
        The card has no weights to download.
    DownloadError, ChecksumMismatch
        They could not be had; see also `add_model`.
    """
    card = store.catalogue().get(model_id)
    if card.weights is None:
        raise ModelNotAvailable(
            f"{card.title} is {card.status}: its weights are not published. If you have them, install them with "
            f"`mshub add {card.id} PATH`."
        )
    if card.weights.kind == "bundled":
        source = sample_data() / f"{model_id}-model"
        return add_model(store, model_id, source, origin={"how": "bundled", "from": f"MSHub {mshub.__version__}"})
    origin = {"how": "fetched", "from": str(card.weights.page)}
    for version in store.versions(model_id):
        if version.record["origin"] == origin:
            return version
    with _downloads(store, model_id) as folder:
        weights = fetch_weights(
            model_id=model_id,
            kind=card.weights.kind,
            locator=str(card.weights.id or card.weights.url),
            sha256=card.weights.sha256,
            folder=folder,
            progress=progress,
        )
        try:
            return add_model(store, model_id, weights, origin=origin)
        finally:
            shutil.rmtree(folder)  # installed, or unusable: the next try must not meet it again


@contextmanager
def _downloads(store: ModelStore, model_id: str) -> Iterator[Path]:
    """Yield the folder for the downloads of one model, held against a second ``mshub fetch`` of it."""
    folder = writable_folder(store.home / "downloads" / model_id)
    try:
        with FileLock(folder.with_suffix(".lock"), timeout=0):
            yield folder
    except Timeout as error:
        raise StoreError(f"{model_id} is being fetched by another process: wait for it to finish.") from error


def _chosen_card(known: Catalogue, model_id: str, card_path: Path | None) -> ModelCard | None:
    if card_path is None:
        return known.get(model_id) if model_id in known else None
    if model_id in Catalogue.load():
        raise CatalogueError(
            f"{model_id} is in MSHub's catalogue and has a card already. Choose another id for your own model."
        )
    card = load_card(card_path)
    if card.id != model_id:
        raise CatalogueError(f"The card {card_path.name} is for {card.id!r}, not {model_id!r}: make the two agree.")
    return card


def _unpacked(
    source: Path, staging: Path, card: ModelCard | None, root: str | None, trust: bool
) -> tuple[Path, dict[str, Any]]:
    """Copy a model into `staging`, as a folder of nnU-Net v2; returns it, and what was done to it for the record."""
    model = staging / "model"
    model.mkdir()
    is_bare = bool(card and card.plan) and extract_state(source, model / STATE)
    if not is_bare:
        extract_model(source, model, root=root)
    trusted = make_plain(model) if trust else []
    facts: dict[str, Any] = {"trusted": trusted} if trusted else {}
    if not is_bare and not is_v1_folder(model):
        return model, facts
    return _converted(model, staging / "converted", card), facts | {"converted": "nnU-Net v1"}


def _converted(v1: Path, target: Path, card: ModelCard | None) -> Path:
    """Convert the v1 model in `v1`, with the names its card has for labels and channels; returns `target`."""
    if card and card.plan and (v1 / STATE).exists():
        convert_v1_state(v1 / STATE, target, card.plan)
        return target
    convert_v1_folder(
        v1,
        target,
        labels=(card.labels if card else None) or (),
        channels=[channel.name for channel in card.channels] if card else (),
        trusted_trainer=card.trainer if card else None,
    )
    for text in [*v1.glob("LICENSE*"), *v1.glob("README*")]:
        shutil.copy(text, target / text.name)
    return target


def _with_licence(card: ModelCard, given: str | None, model: Path) -> ModelCard:
    """Return the card with the terms a person names, else its own, else those of the licence file in the model."""
    licence = given or card.licence or next(filter(None, map(_first_words, sorted(model.glob("LICENSE*")))), None)
    return card.model_copy(update={"licence": licence})


def _first_words(path: Path) -> str | None:
    with path.open(encoding="utf-8", errors="replace") as text:
        lines = ("".join(filter(str.isprintable, line)).strip() for line in text.read(4096).splitlines())
    return next((f"{line[:120]} ({path.name})" for line in lines if line), None)


def _drafted_card(model_id: str, folder: ModelFolder) -> ModelCard:
    card = draft_card(model_id, folder.dataset)
    return card.model_copy(update={"generation": 1}) if folder.predicts_as_v1 else card


def _check_against_card(folder: ModelFolder, card: ModelCard) -> None:
    if card.labels is not None:
        try:
            folder.labels.check_names(card.labels)
        except LabelError as error:
            raise LabelError(f"The card of {card.id} and the model's dataset.json disagree. {error}") from error
    names = tuple(channel.name for channel in card.channels)
    if names and names != folder.channels:
        raise ModelFolderError(
            f"The card of {card.id} names the channels {', '.join(names)}; the model's dataset.json has "
            f"{', '.join(folder.channels)}. Correct the card, or add the model it describes."
        )
    if card.configuration and card.configuration != folder.configuration:
        raise ModelFolderError(
            f"The card of {card.id} is for {card.configuration}; these weights are for {folder.configuration}."
        )


def version_record(
    folder: ModelFolder, card: ModelCard, origin: Mapping[str, str], parent: str | None = None
) -> dict[str, Any]:
    """Return what the store keeps about a version: see `ModelStore.publish`."""
    return {
        "origin": dict(origin),
        "licence": card.licence,
        "labels": dict(folder.labels.published),
        "channels": list(folder.channels),
        "configuration": folder.configuration,
        "folds": list(folder.folds),
        "trainer": folder.trainer,
        "reader": folder.reader,
        "parent": parent,
        "card": dump_card(card),
    }
