"""The app's configuration: one frozen object, parsed once from ``--conf KEY VALUE`` and ``MSHUB_KEY`` variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from mshub.errors import CaseError, ConfigError
from mshub.nnunet.devices import resolve_device
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
    """

    home: Path
    models: tuple[str, ...] = ()
    device: str = "auto"
    profile: str = "accurate"
    cache_gb: float = 8.0

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
            profile=_one_of("profile", chosen.get("profile") or cls.profile, tuple(PROFILES)),
            cache_gb=_positive("cache_gb", chosen.get("cache_gb") or cls.cache_gb),
        )


def _refuse_unknown(chosen: Mapping[str, str]) -> None:
    known = [field.name for field in fields(Config)]
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


def _positive(key: str, value: str | float) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ConfigError(f"{key} is {value!r}; expected a positive number of gigabytes.")
    return number
