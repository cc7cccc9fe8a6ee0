"""How a fine-tuning runs: one frozen set of numbers, kept with every version it made.

The defaults follow what nnU-Net's maintainers and the literature advise for continued training: a learning rate far
below that of a training from scratch, warm-up, polynomial decay, averaged weights, a mix with the parent's. AdamW takes
the place of nnU-Net's SGD: it learned more in the few hundred steps a fine-tuning has. docs/learning.md has what was
measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_type_hints

from mshub.errors import ConfigError

Guard = Literal["distil", "interpolate", "both", "none"]
Optimiser = Literal["sgd", "adam"]


@dataclass(frozen=True)
class Recipe:
    """What to do with the reviewed cases.

    Attributes
    ----------
    epochs, iterations : int
        Epochs, and optimiser steps per epoch. An epoch is what progress is counted in and saved after.
    optimiser : str
        ``adam`` (AdamW) or ``sgd`` (Nesterov momentum 0.99, as nnU-Net trains).
    learning_rate : float
        At its peak, after the warm-up.
    warm_up : float
        Fraction of all steps in which the learning rate rises linearly; polynomial decay (power 0.9) follows.
    weight_decay : float
    foreground : float
        Fraction of each batch whose patches are centred on a structure.
    averaging : float
        The weights are averaged exponentially over this fraction of all steps; 0 takes the last ones.
    guard : str
        Against forgetting what the parent knew: ``distil`` holds the answers the person did not change, ``interpolate``
        mixes the weights with the parent's (WiSE-FT, arXiv 2109.01903), ``both``, or ``none``.
    distillation : float
        Weight of the distillation loss (cross-entropy with the parent's probabilities).
    interpolation : float
        Share of the new weights in the mix, 0 to 1.
    folds : tuple of str
        Folds of the parent to continue; empty continues all of them.
    batch_size : int or None
        None takes the plans'.
    seed : int
    """

    epochs: int = 20
    iterations: int = 50
    optimiser: Optimiser = "adam"
    learning_rate: float = 1e-3
    warm_up: float = 0.1
    weight_decay: float = 3e-5
    foreground: float = 0.5
    averaging: float = 0.1
    guard: Guard = "both"
    distillation: float = 0.5
    interpolation: float = 0.7
    folds: tuple[str, ...] = ()
    batch_size: int | None = None
    seed: int = 0

    @property
    def distils(self) -> bool:
        """Whether the parent's answers are held while training."""
        return self.guard in ("distil", "both") and self.distillation > 0

    @property
    def interpolates(self) -> bool:
        """Whether the result is mixed with the parent's weights."""
        return self.guard in ("interpolate", "both") and self.interpolation < 1

    @property
    def steps(self) -> int:
        """Optimiser steps per fold."""
        return self.epochs * self.iterations

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0 over the whole training of a fold."""
        warm_steps = round(self.warm_up * self.steps)
        if step < warm_steps:
            return self.learning_rate * (step + 1) / warm_steps
        left = (self.steps - step) / max(1, self.steps - warm_steps)
        return float(self.learning_rate * left**0.9)

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe ready for JSON; `from_options` reads it back."""
        return {**asdict(self), "folds": list(self.folds)}

    @classmethod
    def from_options(cls, options: Mapping[str, Any], base: Recipe | None = None) -> Recipe:
        """Change `base` (default: the defaults) by options of a client, which may be text.

        None and empty text mean "not set": Slicer sends every option with every request.

        Raises
        ------
        ConfigError
            An unknown option, with the closest known one, or a value that cannot be.
        """
        known = {field.name for field in fields(cls)}
        chosen = {key: value for key, value in options.items() if value not in (None, "", ())}
        for key in chosen.keys() - known:
            close = get_close_matches(key, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(f"The recipe has no {key!r}.{hint} Known: {', '.join(sorted(known))}.")
        recipe = replace(base or cls(), **{key: _converted(key, value) for key, value in chosen.items()})
        recipe._check()
        return recipe

    def _check(self) -> None:
        limits: dict[str, tuple[float, float]] = {
            **{"epochs": (1, 10_000), "iterations": (1, 10_000), "learning_rate": (1e-9, 100), "warm_up": (0, 0.9)},
            **{"weight_decay": (0, 1), "foreground": (0, 1), "averaging": (0, 1), "distillation": (0, 100)},
            **{"interpolation": (0, 1), "seed": (0, 2**31 - 1)},
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"The recipe's {name} is {getattr(self, name):g}; expected {low:g} to {high:g}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"The recipe's batch_size is {self.batch_size}; expected 1 or more.")


FROM_SCRATCH = Recipe(
    epochs=200,
    iterations=100,
    optimiser="sgd",
    learning_rate=1e-2,
    warm_up=0.0,
    foreground=0.33,
    averaging=0.05,
    guard="none",
)
"""For a model without a parent: nnU-Net's own optimiser and sampling, for a twelfth of its iterations."""


def _converted(key: str, value: Any) -> Any:
    kind = get_type_hints(Recipe)[key]
    choices = [choice for choice in get_args(kind) if isinstance(choice, str)]
    try:
        if isinstance(value, bool):
            raise ValueError("expected a number or a name")
        if choices:
            if value not in choices:
                raise ValueError(f"expected one of {', '.join(choices)}")
            return value
        if key == "folds":
            names = value.split(",") if isinstance(value, str) else list(value)
            return tuple(dict.fromkeys(str(name).strip() for name in names if str(name).strip()))
        if kind is float:
            return float(value)
        if isinstance(value, float) and not value.is_integer():
            raise ValueError("expected a whole number")
        return int(value)
    except (TypeError, ValueError) as error:
        wanted = "expected a number" if kind is float else "expected a whole number"
        told = str(error) if str(error).startswith("expected") else wanted
        raise ConfigError(f"The recipe's {key} is {value!r}: {told}.") from error
