"""What a client may choose for a training, and what of its request is MONAI Label's own and means nothing here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from lib.conf import Config
from mshub.nnunet.devices import available_devices, resolve_device
from mshub.recipe import Guard, Recipe

MONAI_LABELS_OWN = frozenset(
    {
        *("model", "name", "client_id", "device", "pretrained", "max_epochs", "early_stop_patience", "val_split"),
        *("train_batch_size", "val_batch_size", "multi_gpu", "gpus", "dataset", "dataloader", "dataset_limit"),
        *("tracking", "tracking_uri", "tracking_experiment_name", "run_id", "model_filename", "train_random_seed"),
        *("local_rank", "bundle_path", "run_sync", "enqueue", "conf", "description"),
    }
)
"""Keys MONAI Label and its sample apps put into a training request."""


@dataclass(frozen=True)
class TrainOptions:
    """A client's choice, checked.

    Attributes
    ----------
    recipe : Recipe
    device : str
    client : str
        Who asked.
    """

    recipe: Recipe
    device: str
    client: str

    @classmethod
    def parse(cls, options: Mapping[str, Any], config: Config) -> TrainOptions:
        """Read a request; empty text and None mean "not set", and MONAI Label's ``max_epochs`` means ``epochs``.

        Raises
        ------
        ConfigError
            An option nobody knows, or a value that cannot be.
        CaseError
            A device name that is none.
        """
        chosen = {key: value for key, value in options.items() if key not in MONAI_LABELS_OWN}
        device = str(options.get("device") or config.device)
        resolve_device(device)
        return cls(
            recipe=Recipe.from_options({"epochs": options.get("max_epochs"), **_set(chosen)}),
            device=device,
            client=str(options.get("client_id") or ""),
        )


def options_for(model: str, params: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the options of one model: OHIF sends them as ``{model: {...}}``, Slicer as they are."""
    params = params or {}
    common = {key: value for key, value in params.items() if not isinstance(value, Mapping)}
    own = params.get(model)
    return {**common, **(own if isinstance(own, Mapping) else {})}


def client_options(config: Config) -> dict[str, Any]:
    """Return the options for clients, which show lists of text as a choice (the first is the default), others as text.

    Never empty: 3D Slicer hides its training widgets then.
    """
    recipe = Recipe()
    return {
        "device": sorted(available_devices(), key=lambda name: name != config.device),
        "epochs": recipe.epochs,
        "iterations": recipe.iterations,
        "learning_rate": recipe.learning_rate,
        "guard": sorted(get_args(Guard), key=lambda name: name != recipe.guard),
    }


def _set(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value not in (None, "")}
