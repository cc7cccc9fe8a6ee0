"""All models MSHub knows: the cards shipped in ``mshub/models/`` and a lab's own. Adding a model is adding a TOML file.

Loading cards does not load torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mshub.card_draft import draft_card
from mshub.card_tables import AS_STORED, Channel, InputRules, Link, Modality, Plan, Weights, WeightsKind
from mshub.errors import CatalogueError
from mshub.model_card import (
    ModelCard,
    Status,
    did_you_mean,
    dump_card,
    load_card,
    parse_card,
)

__all__ = [
    "AS_STORED",
    "PACKAGED_CARDS",
    "Catalogue",
    "Channel",
    "InputRules",
    "Link",
    "Modality",
    "ModelCard",
    "Plan",
    "Status",
    "Weights",
    "WeightsKind",
    "draft_card",
    "dump_card",
    "load_card",
    "parse_card",
]

PACKAGED_CARDS = Path(__file__).parent / "models"


class Catalogue:
    """All known model cards, by id: those of MSHub in order of id, then a lab's own.

    Use `Catalogue.load`.
    """

    def __init__(self, cards: Sequence[ModelCard]) -> None:
        self._cards = {card.id: card for card in cards}

    @classmethod
    def load(cls, extra_dirs: Sequence[Path] = ()) -> Catalogue:
        """Read the cards shipped with MSHub and those of a lab.

        Parameters
        ----------
        extra_dirs : sequence of Path
            Folders with further ``<id>.toml`` files.

        Raises
        ------
        CatalogueError
            A folder is missing, a card is invalid, its id is not its file's name, or an id appears twice.
        """
        found: dict[str, tuple[Path, ModelCard]] = {}
        for path in [path for folder in (PACKAGED_CARDS, *extra_dirs) for path in _card_files(Path(folder))]:
            card = load_card(path)
            _refuse_other_name(path, card)
            if card.id in found:
                raise CatalogueError(
                    f"Model id {card.id!r} is taken. Found: {found[card.id][0]} and {path}. "
                    "Expected: one card per id. How to fix: give one of them another id and file name."
                )
            found[card.id] = (path, card)
        return cls([card for _, card in found.values()])

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of all models, in the catalogue's order."""
        return tuple(self._cards)

    def get(self, model_id: str) -> ModelCard:
        """Return one card.

        Raises
        ------
        CatalogueError
            No model has this id; the message names close matches and all ids.
        """
        if model_id in self._cards:
            return self._cards[model_id]
        raise CatalogueError(
            f"No model is called {model_id!r}.{did_you_mean(model_id, self.ids)} Expected one of: "
            f"{', '.join(self.ids)}. How to fix: use a known id, or add a model with 'mshub add'."
        )

    def __iter__(self) -> Iterator[ModelCard]:
        return iter(self._cards.values())

    def __len__(self) -> int:
        return len(self._cards)

    def __contains__(self, model_id: object) -> bool:
        return model_id in self._cards


def _card_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CatalogueError(
            f"No folder with model cards. Found: nothing at {folder}. Expected: a folder with <id>.toml files. "
            "How to fix: create it or correct the path."
        )
    return sorted(folder.glob("*.toml"), key=lambda path: path.stem)


def _refuse_other_name(path: Path, card: ModelCard) -> None:
    if card.id != path.stem:
        raise CatalogueError(
            f"Model card {path} has another name than its model. Found: id {card.id!r}. Expected: {path.stem!r}. "
            f"How to fix: rename the file to {card.id}.toml or correct its id."
        )
