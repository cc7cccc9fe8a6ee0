"""Write the model table of README.md from the model cards, or check that it is up to date.

The table stands between two marker lines; everything else in the file is left alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from mshub.catalogue import Catalogue, ModelCard

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- models:begin -->"
END = "<!-- models:end -->"

_HEADINGS = ("Model", "Modality", "Target", "Training scans", "DSC", "Weights", "Notes")


def render_table(cards: Iterable[ModelCard]) -> str:
    """Return a Markdown table with one row per card, in the order given, ending in a newline."""
    rows = [_HEADINGS, ("---",) * len(_HEADINGS), *(_row(card) for card in cards)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def replace_table(text: str, table: str) -> str:
    """Return `text` with `table` between the markers.

    Raises
    ------
    ValueError
        The markers are missing, repeated or in the wrong order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one line {BEGIN} and one line {END} below it, for the model table")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table}{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 where the README needs attention."""
    parser = argparse.ArgumentParser(description="Write the README's model table from the model cards.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the table is stale")
    parser.add_argument("--readme", type=Path, default=README, help="file with the table (default: the repository's)")
    options = parser.parse_args(arguments)
    old = options.readme.read_text(encoding="utf-8")
    try:
        new = replace_table(old, render_table(Catalogue.load()))
    except ValueError as error:
        return _complain(f"{options.readme.name}: {error}. Add them, then run: make table")
    if options.check and new != old:
        return _complain(f"{options.readme.name}: the model table is not what the cards say. Run: make table")
    if new != old:
        options.readme.write_text(new, encoding="utf-8")
    return 0


def _row(card: ModelCard) -> tuple[str, ...]:
    dsc = "–" if card.dsc is None else f"{card.dsc:.2f}"
    cells = (f"`{card.id}`", card.modality, card.target, card.training_scans or "–", dsc, _weights(card), _notes(card))
    return tuple(cell.replace("|", r"\|").replace("\n", " ") for cell in cells)


def _weights(card: ModelCard) -> str:
    page = card.weights.page if card.weights else None
    if page is None:
        return card.status
    place = "Google Drive" if "drive.google.com" in page else "download"
    return f"[{place}]({page}), nnU-Net v{card.generation}"


def _notes(card: ModelCard) -> str:
    return "; ".join([*card.notes, *(f"[{link.title}]({link.url})" for link in card.links)])


def _complain(message: str) -> int:
    print(message, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
