"""The models installed on this machine: immutable versions, one of them current.

::

    <MSHUB_HOME>/models/<id>/
        current            the name of the current version, replaced atomically
        history.jsonl      every promotion: when, from, to, why
        v1/                read-only once published
            model/         the nnU-Net folder
            version.json   where it came from, sha256 of every file, labels, card
    <MSHUB_HOME>/cards/    cards of the lab's own models

Writers hold a file lock per model; readers need none, as everything they read is replaced by one rename.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_data_path

from mshub.atomic_file import replace_json, replace_text
from mshub.card_tables import Channel
from mshub.catalogue import Catalogue, ModelCard, dump_card, parse_card
from mshub.checksums import tree_sha256
from mshub.errors import ChecksumMismatch, ModelNotAvailable, MSHubError, StoreError

logger = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 60.0
_VERSION = re.compile(r"v[1-9][0-9]*")


def default_home() -> Path:
    """Return `MSHUB_HOME`, or the platform's folder for user data."""
    home = os.environ.get("MSHUB_HOME")
    return Path(home).expanduser() if home else user_data_path("mshub", appauthor=False)


@dataclass(frozen=True)
class ModelVersion:
    """One published version of one model.

    Attributes
    ----------
    model_id, version : str
        Such as ``starter`` and ``v1``.
    path : Path
        The version's folder; never changes once published.
    record : dict
        What was known when it was published: see `ModelStore.publish`.
    """

    model_id: str
    version: str
    path: Path
    record: dict[str, Any]

    @property
    def model_path(self) -> Path:
        """The nnU-Net model folder."""
        return self.path / "model"

    @property
    def card(self) -> ModelCard:
        """The card the version was installed with."""
        return parse_card(self.record["card"], f"of {self.model_id} {self.version}")

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The images the model takes, in order, each with its modality."""
        card = self.card
        known = {channel.name: channel for channel in card.channels}
        channels = [known.get(name) or Channel(name=name) for name in self.record["channels"]]
        kind = {"modality": card.modality}
        return tuple(channel if channel.modality else channel.model_copy(update=kind) for channel in channels)

    @property
    def number(self) -> int:
        """3 for ``v3``."""
        return int(self.version[1:])


class ModelStore:
    """Models under `home`.

    Parameters
    ----------
    home : Path, optional
        Default: `default_home()`. Created when first written to.
    """

    def __init__(self, home: Path | None = None) -> None:
        self.home = (home or default_home()).resolve()
        self._models = self.home / "models"
        self._cards = self.home / "cards"

    # -- reading ------------------------------------------------------------------------------------------------

    def catalogue(self) -> Catalogue:
        """Return the cards shipped with MSHub and those of the models this lab added itself."""
        return Catalogue.load([self._cards] if self._cards.is_dir() else [])

    @property
    def prepared_networks(self) -> Path:
        """Where what OpenVINO made of networks is kept; it may be deleted at any time."""
        return self.home / "openvino"

    def installed(self) -> list[str]:
        """Return the ids of models that have a readable current version, sorted; others are named in the log."""
        return sorted(path.parent.name for path in self._models.glob("*/current") if self._is_readable(path.parent))

    def holds(self, model_id: str) -> bool:
        """Return whether a model is here, in whatever state."""
        return (self._models / model_id).is_dir()

    def versions(self, model_id: str) -> list[ModelVersion]:
        """Return all versions of a model, oldest first; none for a model that is not installed."""
        return [_read_version(folder) for folder in self._version_folders(model_id)]

    def readable_versions(self, model_id: str) -> list[ModelVersion]:
        """Return the versions of a model, oldest first, without those whose record is damaged; the log names them."""
        found = list[ModelVersion]()
        for folder in self._version_folders(model_id):
            try:
                found.append(_read_version(folder))
            except StoreError as error:
                logger.warning("%s %s is left out: %s", model_id, folder.name, error)
        return found

    def version(self, model_id: str, version: str) -> ModelVersion:
        """Return one version.

        Raises
        ------
        ModelNotAvailable
            There is none of that name.
        """
        path = self._models / model_id / version
        if not _VERSION.fullmatch(version) or not (path / "version.json").is_file():
            known = ", ".join(v.version for v in self.versions(model_id)) or "none"
            raise ModelNotAvailable(f"{model_id} has no version {version}; installed: {known}.")
        return _read_version(path)

    def current(self, model_id: str) -> ModelVersion:
        """Return the version that serves.

        Raises
        ------
        ModelNotAvailable
            The model is not installed.
        """
        name = self._current_name(self._models / model_id)
        if name is None:
            raise ModelNotAvailable(
                f"The model {model_id} is not installed. Install it with `mshub fetch {model_id}`, or "
                f"`mshub add {model_id} PATH` if you have its folder or zip."
            )
        return self.version(model_id, name)

    def history(self, model_id: str) -> list[dict[str, Any]]:
        """Return every change of a model's current version, oldest first.

        Each is a dict with ``time``, ``from``, ``to``, ``reason`` and ``rollback`` (whether it undid a promotion). A
        line that a killed process or a full disk broke off is left out.
        """
        path = self._models / model_id / "history.jsonl"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        steps = list[dict[str, Any]]()
        for line in filter(str.strip, lines):
            try:
                steps.append(json.loads(line))
            except json.JSONDecodeError:
                logger.warning("a line of the history of %s cannot be read and is left out", model_id)
        return steps

    # -- writing ------------------------------------------------------------------------------------------------

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Yield an empty folder on the store's file system; whatever is left in it is removed afterwards."""
        path = Path(tempfile.mkdtemp(dir=writable_folder(self.home / "staging")))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def publish(
        self, model_id: str, model: Path, record: Mapping[str, Any], *, serve_first: bool = True
    ) -> ModelVersion:
        """Make `model` the next version of `model_id`; the first one becomes current.

        Parameters
        ----------
        model_id : str
        model : Path
            An nnU-Net model folder inside `staging()`; it is moved, not copied.
        record : mapping
            JSON-able facts: origin, licence, labels, channels, card, parent... ``created`` and ``files`` (relative
            path -> sha256) are added here.
        serve_first : bool
            False leaves also the first version to be promoted: nobody has judged a model trained here yet.

        Returns
        -------
        ModelVersion
            The new version, or the existing one when its files and its card are the same. A corrected card makes a
            new version: what an installed version does never changes.
        """
        files = tree_sha256(model)
        with self._locked(model_id) as folder:
            for version in self.versions(model_id):
                if (version.record["files"], version.record.get("card")) == (files, record.get("card")):
                    if serve_first:
                        self._serve_if_none(folder, version.version)
                    return version
            told = [int(step["to"][1:]) for step in self.history(model_id)]  # also of versions that were removed
            number = max([version.number for version in self.versions(model_id)] + told, default=0) + 1
            target = folder / f"v{number}"
            self._move_into_place(model, target, {**record, "created": utc_now(), "files": files})
            if serve_first:
                self._serve_if_none(folder, target.name)
        logger.info("published %s %s", model_id, target.name)
        return _read_version(target)

    def keep_card(self, card: ModelCard) -> None:
        """Take the card of a lab's own model into the catalogue of this store."""
        replace_text(writable_folder(self._cards) / f"{card.id}.toml", dump_card(card))

    def promote(
        self, model_id: str, version: str, reason: str, instead_of: Collection[str] | None = None
    ) -> ModelVersion:
        """Make `version` the current one; predictions that are running finish with the one they started with.

        Parameters
        ----------
        model_id, version, reason : str
        instead_of : collection of str, optional
            The versions it was compared with; None takes the place of any.

        Raises
        ------
        ModelNotAvailable
            There is no such version.
        StoreError
            Another version serves than those of `instead_of`.
        """
        chosen = self.version(model_id, version)
        with self._locked(model_id) as folder:
            serving = self._current_name(folder)
            if instead_of is not None and serving and serving not in instead_of:
                raise StoreError(
                    f"{version} passed the gate, but {serving} was promoted meanwhile, which it was not compared with. "
                    f"It is kept; a person decides: `mshub promote {model_id} {version}`."
                )
            self._set_current(folder, chosen.version, reason)
        return chosen

    def rollback(self, model_id: str) -> ModelVersion:
        """Undo the last promotion; a second rollback undoes the one before it.

        Raises
        ------
        StoreError
            No promotion is left to undo.
        """
        self.current(model_id)
        with self._locked(model_id) as folder:
            served = self._promotions(model_id)
            if len(served) < 2:
                raise StoreError(f"{model_id} serves the version it started with; there is nothing to go back to.")
            self._set_current(folder, served[-2], f"rollback from {served[-1]}", rollback=True)
        return self.version(model_id, served[-2])

    def verify(self, model_id: str, version: str | None = None) -> ModelVersion:
        """Compare every file of a version with the sha256 recorded when it was published.

        Raises
        ------
        ChecksumMismatch
            Files changed, vanished or appeared; the message names them.
        """
        chosen = self.version(model_id, version) if version else self.current(model_id)
        recorded, found = chosen.record["files"], tree_sha256(chosen.model_path)
        wrong = sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))
        if wrong:
            raise ChecksumMismatch(
                f"{model_id} {chosen.version} is not what was installed: {', '.join(wrong)} differ from the recorded "
                "sha256. Install it again with `mshub add` or `mshub fetch`; do not use it."
            )
        return chosen

    # -- private ------------------------------------------------------------------------------------------------

    def _version_folders(self, model_id: str) -> list[Path]:
        """Return the folders of a model's versions, oldest first."""
        found = [path.parent for path in (self._models / model_id).glob("v*/version.json")]
        return sorted(
            (folder for folder in found if _VERSION.fullmatch(folder.name)), key=lambda folder: int(folder.name[1:])
        )

    def _promotions(self, model_id: str) -> list[str]:
        """Return the versions promoted and not rolled back, each once in a row; the last one serves."""
        served: list[str] = []
        for step in self.history(model_id):
            if step["rollback"]:
                del served[-1:]
            elif served[-1:] != [step["to"]]:
                served.append(step["to"])
        current = self.current(model_id).version  # written before the history: a crash between them is made good here
        if current not in served:
            return [*served, current]
        while served[-1] != current:  # a rollback that is not in the history
            served.pop()
        return served

    def _is_readable(self, folder: Path) -> bool:
        """Return whether a model has a current version whose record and card can be read."""
        name = self._current_name(folder)
        if name is None:
            return False
        try:
            return bool(_read_version(folder / name).card)
        except MSHubError as error:
            logger.warning("%s is left out: %s", folder.name, error)
            return False

    @contextmanager
    def _locked(self, model_id: str) -> Iterator[Path]:
        folder = writable_folder(self._models / model_id)
        try:
            held = FileLock(folder / ".lock").acquire(timeout=LOCK_TIMEOUT_S)
        except Timeout as error:
            raise StoreError(
                f"Another process has been changing {model_id} for {LOCK_TIMEOUT_S:g} s. Wait until it is done and try "
                "again."
            ) from error
        with held:
            yield folder

    def _current_name(self, folder: Path) -> str | None:
        try:
            name = (folder / "current").read_text(encoding="utf-8").strip()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, UnicodeDecodeError):
            return None
        return name if _VERSION.fullmatch(name) and (folder / name / "version.json").is_file() else None

    def _move_into_place(self, model: Path, target: Path, record: Mapping[str, Any]) -> None:
        """Assemble the version beside the model and rename it once, so that a version is whole or absent."""
        assembled = Path(tempfile.mkdtemp(dir=model.parent))
        model.replace(assembled / "model")
        replace_json(assembled / "version.json", record)
        _make_read_only(assembled)
        assembled.chmod(0o755)  # temporary folders are private; a store may be shared
        assembled.replace(target)

    def _serve_if_none(self, folder: Path, version: str) -> None:
        """Make `version` current unless one is: the first, or one whose publishing broke off before the pointer."""
        if self._current_name(folder) is None:
            self._set_current(folder, version, "first version")

    def _set_current(self, folder: Path, version: str, reason: str, rollback: bool = False) -> None:
        before = self._current_name(folder)
        step = {"time": utc_now(), "from": before, "to": version, "reason": reason, "rollback": rollback}
        replace_text(folder / "current", version + "\n")
        with (folder / "history.jsonl").open("ab+") as history:
            history.seek(max(0, history.seek(0, os.SEEK_END) - 1))
            is_whole = history.read() in (b"", b"\n")  # or the last line was broken off
            line = json.dumps(step, ensure_ascii=False) + "\n"
            history.write(("" if is_whole else "\n").encode() + line.encode())
            history.flush()
            os.fsync(history.fileno())


def writable_folder(path: Path) -> Path:
    """Create a folder of the store and return it.

    Raises
    ------
    StoreError
        It cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise StoreError(f"{path} cannot be written ({error}). Point MSHUB_HOME elsewhere.") from error
    return path


def _read_version(path: Path) -> ModelVersion:
    try:
        record = json.loads((path / "version.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise StoreError(
            f"{path / 'version.json'} cannot be read ({error}). Remove {path} and install it again."
        ) from error
    return ModelVersion(path.parent.name, path.name, path, record)


def _make_read_only(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o444)


def utc_now() -> str:
    """Return this moment as records, jobs and labels note it: ISO 8601, UTC, in seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
