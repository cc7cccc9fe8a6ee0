"""The app's configuration: one frozen object, parsed once from ``--conf KEY VALUE`` and ``MSHUB_KEY`` variables."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from lib.oidc_settings import KEYS as OIDC_KEYS
from lib.oidc_settings import OidcSettings
from mshub.errors import CaseError, ConfigError
from mshub.nnunet.devices import resolve_device
from mshub.nnunet.engine import RUNTIMES
from mshub.nnunet.predictor import PROFILES
from mshub.store import default_home

ENVIRONMENT_PREFIX = "MSHUB_"
SERVER_KEYS = frozenset({"server_mode"})
"""Keys MONAI Label itself reads from ``--conf``."""


@dataclass(frozen=True)
class Config:
    """What an operator can choose. ``--conf`` wins over the environment, which wins over these defaults.

    Attributes
    ----------
    home : Path
        Where models live (`MSHUB_HOME`).
    models : tuple of str
        Ids to serve, comma-separated in ``--conf``; empty serves every installed model.
    device : str
        Device of requests that name none: ``auto``, ``cpu``, ``cuda:1``...
    profile : str
        Profile of requests that name none: see `mshub.nnunet.predictor.PROFILES`.
    cache_gb : float
        Memory for the weights of warm networks.
    images_gb : float
        Memory for images that are ready for the network, so that another request for one need not read it; 0: none.
    engine : str
        What runs networks on the CPU, see `mshub.nnunet.engine.RUNTIMES`: ``auto`` is OpenVINO where it is installed.
    disk_gb : float
        Disk for copies of series of the PACS; those used longest ago go first.
    upload_gb : float
        The largest request that is read: an image, or all files of a series.
    pacs_timeout : float
        So many seconds a PACS may send nothing while it sends images; a third of it for every other question.
    queue : int
        So many predictions may wait for each device; a further request is answered 503, with when to try again.
    lease_minutes : float
        How long a case that was offered to somebody is offered to nobody else.
    audit_every : int
        Every so many choices of a strategy, a case is drawn at random for the hold-out; 0: never.
    idle_minutes : float
        At most so many minutes of an hour are spent on looking at cases while nobody needs the server; 0: none.
    idle_cases : int
        So many waiting cases of a model, at most, are looked at: of a large PACS a random sample.
    oidc : OidcSettings, optional
        Single sign-on, by the keys ``oidc_...``; None if none is set.
    """

    home: Path
    models: tuple[str, ...] = ()
    device: str = "auto"
    profile: str = "accurate"
    cache_gb: float = 8.0
    images_gb: float = 1.0
    engine: str = "auto"
    disk_gb: float = 50.0
    upload_gb: float = 8.0
    pacs_timeout: float = 30.0
    queue: int = 8
    lease_minutes: float = 60.0
    audit_every: int = 5
    idle_minutes: float = 30.0
    idle_cases: int = 200
    oidc: OidcSettings | None = None

    @property
    def lease_s(self) -> float:
        """`lease_minutes` in seconds."""
        return self.lease_minutes * 60

    def data_folder(self, studies: str) -> Path:
        """Return where labels and their index are: in the folder of images, or of a PACS in one of its own here."""
        return self.home / "pacs" / short_hash(studies.rstrip("/")) if "://" in studies else Path(studies)

    @classmethod
    def parse(cls, conf: Mapping[str, str], environment: Mapping[str, str] | None = None) -> Config:
        """Read ``--conf`` pairs and ``MSHUB_*`` variables.

        Raises
        ------
        ConfigError
            An unknown key, with the closest known one, or a value that cannot be.
        """
        environment = os.environ if environment is None else environment
        from_environment = {
            key.removeprefix(ENVIRONMENT_PREFIX).lower(): value
            for key, value in environment.items()
            if key.startswith(ENVIRONMENT_PREFIX)
        }
        chosen = {**from_environment, **{key: value for key, value in conf.items() if key not in SERVER_KEYS}}
        _refuse_unknown(chosen)
        return cls(
            home=Path(chosen["home"]).expanduser() if chosen.get("home") else default_home(),
            models=tuple(name.strip() for name in chosen.get("models", "").split(",") if name.strip()),
            device=_device(chosen.get("device") or cls.device),
            engine=_one_of("engine", chosen.get("engine") or cls.engine, RUNTIMES),
            profile=_one_of("profile", chosen.get("profile") or cls.profile, tuple(PROFILES)),
            cache_gb=_number("cache_gb", chosen.get("cache_gb") or cls.cache_gb, "gigabytes"),
            images_gb=_number("images_gb", chosen.get("images_gb") or cls.images_gb, "gigabytes", least=0),
            disk_gb=_number("disk_gb", chosen.get("disk_gb") or cls.disk_gb, "gigabytes"),
            upload_gb=_number("upload_gb", chosen.get("upload_gb") or cls.upload_gb, "gigabytes"),
            pacs_timeout=_number("pacs_timeout", chosen.get("pacs_timeout") or cls.pacs_timeout, "seconds"),
            queue=_whole("queue", chosen.get("queue") or cls.queue, "predictions"),
            lease_minutes=_number("lease_minutes", chosen.get("lease_minutes") or cls.lease_minutes, "minutes"),
            audit_every=_whole("audit_every", chosen.get("audit_every") or cls.audit_every, "choices"),
            idle_minutes=_number(
                "idle_minutes", chosen.get("idle_minutes") or cls.idle_minutes, "minutes", least=0, most=60
            ),
            idle_cases=_whole("idle_cases", chosen.get("idle_cases") or cls.idle_cases, "cases"),
            oidc=OidcSettings.parse(chosen),
        )


def short_hash(text: str) -> str:
    """Return the name of what belongs to a folder or an address."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _refuse_unknown(chosen: Mapping[str, str]) -> None:
    known = [*(field.name for field in fields(Config) if field.name != "oidc"), *OIDC_KEYS]
    for key in chosen:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(
                f"Unknown option {key} (--conf {key} or {ENVIRONMENT_PREFIX}{key.upper()}).{hint} "
                f"Known: {', '.join(known)}."
            )


def _one_of(key: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ConfigError(f"{key} is {value!r}; expected one of {', '.join(known)}.")
    return value


def _device(name: str) -> str:
    try:
        resolve_device(name)
    except CaseError as error:
        raise ConfigError(str(error)) from error
    return name


def _number(
    key: str, value: str | float, unit: str, *, least: float | None = None, most: float = float("inf")
) -> float:
    """Return a number of at least `least`, or a positive one."""
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if (number >= least if least is not None else number > 0) and number <= most and number < float("inf"):
        return number
    expected = f"a number of {unit} from {least:g}" if least is not None else f"a positive number of {unit}"
    limit = f" to {most:g}" if most < float("inf") else ""
    raise ConfigError(f"{key} is {value!r}; expected {expected}{limit}.")


def _whole(key: str, value: str | int, unit: str) -> int:
    """Return a whole number from 0."""
    number = _number(key, value, unit, least=0)
    if number != int(number):
        raise ConfigError(f"{key} is {value!r}; expected a whole number of {unit} from 0.")
    return int(number)
