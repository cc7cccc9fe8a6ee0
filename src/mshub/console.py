"""What the command line shares to talk to people: two consoles, progress bars, lines that can be pasted."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mshub.errors import ConfigError

out, err = Console(highlight=False), Console(stderr=True, highlight=False)


def bytes_progress() -> Progress:
    """Return a progress bar for a download, on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=err)


def tile_progress() -> Progress:
    """Return a progress bar for the tiles of a prediction, on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tiles"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=err)


def epoch_progress() -> Progress:
    """Return a progress bar for the epochs of a training, on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=err)


def print_json(content: Any) -> None:
    """Print `content` as JSON, unstyled, for programs."""
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def readable(value: Any) -> str:
    """Return a value of a card or record as text for a table."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    if isinstance(value, list):
        return "\n".join(map(readable, value)) if value and isinstance(value[0], dict) else ", ".join(map(str, value))
    return str(value)


def this_command() -> str:
    """Return how to run this program again, with the store it used, so that a pasted line works."""
    home, program = os.environ.get("MSHUB_HOME"), Path(sys.argv[0])
    if program.name == "__main__.py":
        command = f"{shlex.quote(sys.executable)} -m mshub"
    else:
        command = "mshub" if shutil.which("mshub") == str(program) else shlex.quote(near(program))
    return f"MSHUB_HOME={shlex.quote(near(Path(home)))} {command}" if home else command


def near(path: Path) -> str:
    """Return `path` as seen from the working directory where it is inside it; not from that of services, ``/``."""
    absolute, here = path.absolute(), Path.cwd()
    is_inside = absolute.is_relative_to(here) and here != here.parent
    return str(absolute.relative_to(here) if is_inside else absolute)


def key_values(option: str, items: Sequence[str], example: str) -> dict[str, str]:
    """Return what a repeatable option ``KEY=VALUE`` says.

    Raises
    ------
    ConfigError
        One of `items` has no value; the message names the `option` and an `example`.
    """
    wrong = [item for item in items if "=" not in item]
    if wrong:
        raise ConfigError(f"{option} {wrong[0]} has no value; expected KEY=VALUE, such as {option} {example}.")
    return dict(item.split("=", 1) for item in items)
