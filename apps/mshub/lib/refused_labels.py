"""Labels that were refused, kept for the person who drew them."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mshub.atomic_file import replace_by_copy, replace_json


class RefusedLabels:
    """Labels nobody could use as they came: kept, with the reason, for the person who drew them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, label: Path, image_id: str, tag: str, info: dict[str, Any], reason: str) -> str:
        """Copy `label` aside, with a ``.json`` of the reason and the request beside it; returns its name."""
        stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%f")
        name = f"{image_id}_{stamp}{''.join(label.suffixes[-2:])}"
        replace_by_copy(label, self._folder / name)
        facts = {"image": image_id, "tag": tag, "reason": reason, "params": info}
        replace_json(self._folder / f"{name}.json", facts)
        return f"{self._folder.name}/{name}"
