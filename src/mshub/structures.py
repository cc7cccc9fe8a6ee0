"""Anatomical structures as DICOM names and draws them: one table shared by all models.

A structure is known by its name alone. The table (``structures.toml``) gives a name its codes and its colour; a card
may say otherwise for its model; a name nobody knows gets a private code and a colour that follow from the name, so that
it is coded and drawn alike wherever it turns up.
"""

from __future__ import annotations

import colorsys
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from mshub.card_tables import Table, Text
from mshub.label_rules import fold

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRIVATE_SCHEME = "99MSHUB"
SNOMED = "SCT"
LONGEST_CODE, LONGEST_MEANING = 16, 64  # DICOM's SH and LO, in characters

Colour = tuple[int, int, int]

_SIDES = {"left": "left", "l": "left", "lt": "left", "right": "right", "r": "right", "rt": "right"}
_TUMOUR_WORDS = ("tumor", "tumour", "lesion", "gtv", "cancer", "carcinoma", "neoplasm", "metasta")
_RIGHT_IS_DARKER = 0.72


class Code(NamedTuple):
    """A coded concept, as in DICOM's code sequences: at most 16, 16 and 64 characters."""

    value: str
    scheme: str
    meaning: str


ANATOMY = Code("123037004", SNOMED, "Anatomical Structure")
ABNORMAL = Code("49755003", SNOMED, "Morphologically Abnormal Structure")
SPATIAL = Code("309825002", SNOMED, "Spatial and Relational Concept")
TISSUE = Code("85756007", SNOMED, "Tissue")
LEFT = Code("7771000", SNOMED, "Left")
RIGHT = Code("24028007", SNOMED, "Right")

_CATEGORIES = {"anatomy": ANATOMY, "abnormal": ABNORMAL, "spatial": SPATIAL}
_MODIFIERS = {"left": LEFT, "right": RIGHT}


@dataclass(frozen=True)
class Structure:
    """One structure, as DICOM objects and viewers show it.

    Attributes
    ----------
    name : str
        As the model spells it.
    category, type : Code
        Segmented property category (CID 7150) and type (CID 7151, or private).
    modifier : Code or None
        What tells it from others of its type: its side, mostly.
    region : Code or None
        The organ an abnormal structure is in.
    colour : (int, int, int)
        Red, green, blue, 0..255.
    """

    name: str
    category: Code
    type: Code
    modifier: Code | None
    region: Code | None
    colour: Colour

    @property
    def is_tumour(self) -> bool:
        """Whether its name says that it is a tumour or a lesion."""
        return is_tumour(self.name)


_Byte = Annotated[int, Field(ge=0, le=255)]
_CodeValue = Annotated[str, Field(min_length=1, max_length=LONGEST_CODE, pattern=r"^[^\\]+$")]
_Meaning = Annotated[str, Field(min_length=1, max_length=LONGEST_MEANING, pattern=r"^[^\\]+$")]
_SnomedCode = tuple[Annotated[str, Field(pattern=r"^[0-9]{6,16}$")], _Meaning]
_CardCode = tuple[_CodeValue, _CodeValue, _Meaning]


class StructureOverride(Table):
    """What a card says of one of its structures: ``[structures."name"]``. What it leaves out follows from the name.

    Attributes
    ----------
    category, type, modifier, region : (str, str, str) or None
        Code value, coding scheme and meaning, such as ``["10200004", "SCT", "Liver"]``.
    colour : (int, int, int) or None
        Red, green, blue, 0..255.
    """

    category: _CardCode | None = None
    type: _CardCode | None = None
    modifier: _CardCode | None = None
    region: _CardCode | None = None
    colour: tuple[_Byte, _Byte, _Byte] | None = None


class _Entry(Table):
    """One table of ``structures.toml``."""

    names: Annotated[tuple[Text, ...], Field(min_length=1)]
    colour: tuple[_Byte, _Byte, _Byte]
    category: Literal["anatomy", "abnormal", "spatial"] = "anatomy"
    type: _SnomedCode | None = None
    modifier: _SnomedCode | None = None
    region: _SnomedCode | None = None
    paired: bool = False


def structure(name: str, overrides: Mapping[str, StructureOverride] | None = None) -> Structure:
    """Return codes and colour of a structure by its name.

    Parameters
    ----------
    name : str
        As the model spells it. Case, spaces and punctuation do not count.
    overrides : mapping of str to StructureOverride, optional
        What the model's card says, by the names of its structures.

    Returns
    -------
    Structure
        A name that is in no table has the category Tissue (Morphologically Abnormal Structure where the name says that
        it is a tumour), a private code and a colour that depend on nothing but the name.
    """
    found = _from_table(name) or _unknown(name)
    said = {fold(known): override for known, override in (overrides or {}).items()}.get(fold(name))
    return found if said is None else _overridden(found, said)


def structures(names: Iterable[str], overrides: Mapping[str, StructureOverride] | None = None) -> dict[str, Structure]:
    """Return the structures of one model by name, in the order given, no two of one colour.

    Of two whose colours clash the later one gets a colour of its own; only what a card says is kept as it is.
    """
    found = {name: structure(name, overrides) for name in names}
    taken = {override.colour for override in (overrides or {}).values() if override.colour}
    distinct: dict[str, Structure] = {}
    for name, described in found.items():
        chosen = _override_colour(name, overrides) or _free_colour(described, taken)
        taken.add(chosen)
        distinct[name] = replace(described, colour=chosen)
    return distinct


def is_tumour(name: str) -> bool:
    """Whether a name says that the structure is a tumour or a lesion."""
    return any(word in fold(name) for word in _TUMOUR_WORDS)


def _override_colour(name: str, overrides: Mapping[str, StructureOverride] | None) -> Colour | None:
    return next((said.colour for known, said in (overrides or {}).items() if fold(known) == fold(name)), None)


def _free_colour(described: Structure, taken: Iterable[Colour]) -> Colour:
    chosen, attempt = described.colour, 0
    while chosen in taken:
        attempt += 1
        chosen = _colour_of(f"{fold(described.name)} {attempt}")
    return chosen


def _from_table(name: str) -> Structure | None:
    words = _words(name)
    entry = _table().get("".join(words))
    if entry is not None:
        return _described(name, entry, None)
    for side, rest in ((_SIDES.get(words[-1]), words[:-1]), (_SIDES.get(words[0]), words[1:])) if words else ():
        entry = _table().get("".join(rest)) if side else None
        if entry is not None and entry.paired:
            return _described(name, entry, side)
    return None


def _words(name: str) -> list[str]:
    """Return the words of a name: ``Parotid_L``, ``ParotidL`` and ``left parotid`` alike fall apart at their seams."""
    return [word.casefold() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+|\d+", name)]


@cache
def _table() -> Mapping[str, _Entry]:
    content = tomllib.loads((files("mshub") / "structures.toml").read_text(encoding="utf-8"))
    entries = [_Entry.model_validate(entry) for entry in content["structure"]]
    return {"".join(_words(name)): entry for entry in entries for name in entry.names}


def _described(name: str, entry: _Entry, side: str | None) -> Structure:
    return Structure(
        name,
        _CATEGORIES[entry.category],
        _snomed(entry.type) or _private_code(name),
        _MODIFIERS[side] if side else _snomed(entry.modifier),
        _snomed(entry.region),
        _darker(entry.colour) if side == "right" else entry.colour,
    )


def _unknown(name: str) -> Structure:
    category = ABNORMAL if is_tumour(name) else TISSUE
    return Structure(name, category, _private_code(name), None, None, _colour_of(fold(name)))


def _overridden(found: Structure, said: StructureOverride) -> Structure:
    return replace(
        found,
        category=Code(*said.category) if said.category else found.category,
        type=Code(*said.type) if said.type else found.type,
        modifier=Code(*said.modifier) if said.modifier else found.modifier,
        region=Code(*said.region) if said.region else found.region,
        colour=said.colour or found.colour,
    )


def _snomed(code: tuple[str, str] | None) -> Code | None:
    return Code(code[0], SNOMED, code[1]) if code else None


def _private_code(name: str) -> Code:
    """Return a code that is the same for every spelling of the name: what can be read of it, and a check sum."""
    known = fold(name)
    legible = re.sub(r"[^A-Z0-9]", "", known.upper())[: LONGEST_CODE - 7]
    return Code(f"{legible}-{sha256(known.encode()).hexdigest()[:6]}", PRIVATE_SCHEME, _meaning(name))


def _meaning(name: str) -> str:
    return " ".join(name.replace("\\", "/").split())[:LONGEST_MEANING]


def _colour_of(text: str) -> Colour:
    """Return a clear colour that follows from a text."""
    digest = sha256(text.encode()).digest()
    hue, saturation, value = digest[0] / 256 + digest[1] / 65536, 0.55 + digest[2] / 640, 0.7 + digest[3] / 860
    red, green, blue = (round(part * 255) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def _darker(colour: Colour) -> Colour:
    red, green, blue = (round(part * _RIGHT_IS_DARKER) for part in colour)
    return red, green, blue
