"""Draft the card of a lab's own model from what nnU-Net's ``dataset.json`` says about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mshub.card_tables import Modality
from mshub.dataset_json import is_v1_style
from mshub.labels import LabelMap
from mshub.model_card import ModelCard, validated_card

_MR_MARKS = ("mr", "t1", "t2", "flair", "dwi", "adc", "swi")


def draft_card(model_id: str, dataset: Mapping[str, object]) -> ModelCard:
    """Draft the card of a lab's own model from what nnU-Net knows about it.

    Parameters
    ----------
    model_id : str
        Id of the new model.
    dataset : mapping
        Content of ``dataset.json``, nnU-Net v2 or v1.

    Returns
    -------
    ModelCard
        Status ``local``. Title, channels, labels, licence and number of scans are copied; the modality is guessed
        from the name of the first channel; the site, which nnU-Net does not record, reads ``unspecified``.

    Raises
    ------
    CatalogueError
        The id is not allowed.
    LabelError
        The labels are unusable.
    """
    labels = LabelMap.from_dataset_json(dataset).names
    channels = _channel_names(dataset)
    draft = {
        "id": model_id,
        "title": _text(dataset, "name") or model_id,
        "site": "unspecified",
        "modality": _guess_modality(channels),
        "target": ", ".join(labels),
        "status": "local",
        "description": _text(dataset, "description"),
        "generation": 1 if is_v1_style(dataset.get("labels")) else 2,
        "labels": labels,
        "training_scans": _text(dataset, "numTraining"),
        "licence": _text(dataset, "licence") or _text(dataset, "license"),
        "channels": [{"name": name} for name in channels],
    }
    return validated_card(draft, source=f"drafted for {model_id!r}")


def _channel_names(dataset: Mapping[str, object]) -> list[str]:
    """Channel names in nnU-Net's order, which is that of the numbers they are listed under."""
    channels = dataset.get("channel_names") or dataset.get("modality")
    if not isinstance(channels, Mapping):
        return []
    return [str(channels[key]) for key in sorted(channels, key=lambda key: (len(str(key)), str(key)))]


def _guess_modality(channels: Sequence[str]) -> Modality:
    first = channels[0].strip().lower() if channels else ""
    if first in ("ct", "cect", "ncct", "cta"):
        return "CT"
    if first in ("pt", "pet"):
        return "PT"
    return "MR" if any(mark in first for mark in _MR_MARKS) else "other"


def _text(dataset: Mapping[str, object], key: str) -> str | None:
    value = dataset.get(key)
    return str(value).strip() or None if isinstance(value, (str, int)) else None
