"""One model's card: what is known about it, as data, read strictly from TOML and written back.

A mistyped key is an error with a suggestion, never silently ignored.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from mshub.card_tables import Channel, Finite, InputRules, Link, Modality, Plan, Table, Text, Weights
from mshub.errors import CatalogueError, LabelError
from mshub.label_rules import refuse_unfit_names
from mshub.structures import StructureOverride

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Status = Literal["released", "announced", "bundled", "local"]

_Count = Annotated[str, Field(min_length=1), BeforeValidator(lambda n: str(n) if type(n) is int else n)]


class ModelCard(Table):
    """What is known about one model.

    Attributes
    ----------
    id : str
        Lower-case letters, digits and hyphens; the name of the card's file.
    title, site, target : str
        For people: what it is called, where in the body it looks, what it outlines.
    modality : str
        ``CT``, ``MR``, ``PT``, ``US`` or ``other``.
    status : str
        ``released`` (weights can be fetched), ``announced`` (not yet), ``bundled`` (shipped with MSHub) or ``local``.
    generation : int or None
        nnU-Net version, 1 or 2; only an announced model may leave it open.
    configuration : str or None
        nnU-Net configuration, such as ``3d_fullres``.
    trainer : str or None
        Trainer class of an nnU-Net v1 release that is not nnU-Net's own and, as its makers say, keeps nnU-Net's network
        and preprocessing; such a release is not imported otherwise.
    channels : tuple of Channel
        Input images in nnU-Net's order; empty where unknown, then ``dataset.json`` decides.
    labels : tuple of str or None
        Structures in ascending order of predicted value, without background; checked against ``dataset.json``.
    input_clip : tuple of two float, or None
        Low and high, in the image's own units (HU for CT): the image is clipped to them before nnU-Net preprocesses it.
    orientation : str or None
        Axis codes of the images the model was made for, such as ``RAS`` (directions x, y, z point to): every image is
        turned to them before nnU-Net sees it, and its label back. Left out: images are seen as they are stored, which
        is what nnU-Net does.
    training_scans : str or None
        Number of training scans, as published: ``1018`` or ``>3500``.
    dsc, dsc_source : float and str, or None
        Reported Dice similarity coefficient, 0..1, and the edition of the catalogue it is from.
    licence, access, description : str or None
        Terms of use, conditions of access, and more about the model.
    structures : dict of str to StructureOverride
        DICOM codes and colours of structures, by name, where MSHub's own table does not know better.
    plan : Plan or None
        What a bare state file of nnU-Net v1, weights without their plans, does not say itself.
    weights : Weights or None
        Where to fetch the weights.
    links : tuple of Link
        Publications.
    notes : tuple of str
        What a user should know, one short sentence each.
    """

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{1,62}$")]
    title: Text
    site: Text
    modality: Modality
    target: Text
    status: Status
    description: Text | None = None
    generation: Literal[1, 2] | None = None
    configuration: Text | None = None
    trainer: Text | None = None
    labels: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    input_clip: tuple[Finite, Finite] | None = None
    orientation: Annotated[str, Field(pattern=r"^[RLAPSI]{3}$")] | None = None
    training_scans: _Count | None = None
    dsc: Annotated[float, Field(ge=0, le=1)] | None = None
    dsc_source: Text | None = None
    licence: Text | None = None
    access: Text | None = None
    notes: tuple[Text, ...] = ()
    channels: tuple[Channel, ...] = ()
    structures: dict[str, StructureOverride] = Field(default_factory=dict)
    plan: Plan | None = None
    weights: Weights | None = None
    links: tuple[Link, ...] = ()

    @field_validator("labels")
    @classmethod
    def _names_can_be_told_apart(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        try:
            refuse_unfit_names(labels or ())
        except LabelError as error:
            raise ValueError(str(error)) from error
        return labels

    @field_validator("input_clip")
    @classmethod
    def _low_is_below_high(cls, clip: tuple[float, float] | None) -> tuple[float, float] | None:
        if clip and not clip[0] < clip[1]:
            raise ValueError("[low, high] with low < high")
        return clip

    @field_validator("orientation")
    @classmethod
    def _axes_are_three(cls, orientation: str | None) -> str | None:
        if orientation and any(len(set(pair) & set(orientation)) != 1 for pair in ("LR", "AP", "SI")):
            raise ValueError("one of L and R, one of A and P, one of S and I")
        return orientation

    @model_validator(mode="after")
    def _keys_agree(self) -> ModelCard:
        kind = self.weights.kind if self.weights else None
        faults = {
            "a released model needs [weights], or the status 'announced'": self.status == "released" and not kind,
            "an announced model has no [weights] yet, or its status is 'released'": self.status == "announced" and kind,
            "[weights] kind 'bundled' and status 'bundled' go together": (self.status == "bundled")
            != (kind == "bundled"),
            "'generation' (1 or 2), unless announced": self.generation is None and self.status != "announced",
            "'dsc' together with 'dsc_source', the edition it is from": self.dsc is not None and not self.dsc_source,
        }
        if broken := [rule for rule, is_broken in faults.items() if is_broken]:
            raise ValueError("; ".join(broken))
        return self

    @property
    def input_rules(self) -> InputRules:
        """What is done to every image before nnU-Net sees it."""
        return InputRules(self.input_clip, self.orientation)


def load_card(path: Path) -> ModelCard:
    """Read and validate one card.

    The file may have any name: only in a catalogue folder must it be the id (`Catalogue.load`).

    Raises
    ------
    CatalogueError
        The file cannot be read, is no TOML, or a key is unknown, missing or wrong. The message gives file, key, what
        was found and what was expected.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CatalogueError(
            f"Model card {path} cannot be read. Found: {error}. Expected: a TOML file in UTF-8. "
            "How to fix: correct it; any card in mshub/models/ is an example."
        ) from error
    return validated_card(content, source=str(path))


def parse_card(text: str, source: str) -> ModelCard:
    """Read a card that `dump_card` wrote, perhaps in another version of MSHub: keys unknown today are left out.

    `source` says in errors whose card it is.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CatalogueError(f"Model card {source} cannot be read. Found: {error}. Expected: TOML.") from error
    return validated_card({key: value for key, value in content.items() if key in ModelCard.model_fields}, source)


def dump_card(card: ModelCard) -> str:
    """Return a card as TOML text that `load_card` reads back as an equal card. Empty keys are left out."""
    content = card.model_dump(mode="json", exclude_none=True)
    told = {key: value for key, value in content.items() if value not in ([], {})}
    return tomli_w.dumps(told, multiline_strings=False)


def validated_card(content: Mapping[str, Any], source: str) -> ModelCard:
    """Return the card with this content; `source` says in errors whose card it is.

    Raises
    ------
    CatalogueError
        Lists every key that is unknown, missing or wrong.
    """
    try:
        return ModelCard.model_validate(content)
    except ValidationError as error:
        faults = "\n".join(f"  {_fault(detail)}" for detail in error.errors())
        raise CatalogueError(f"Model card {source} is not valid. How to fix: correct\n{faults}") from error


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return a sentence with the known names that `name` resembles, or nothing."""
    close = get_close_matches(name, known)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _fault(detail: ErrorDetails) -> str:
    """Say in one line which key is wrong, what was found there and what was expected."""
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        name, known = str(detail["loc"][-1]), _known_keys(detail["loc"])
        return f"key {key!r}: found an unknown key.{did_you_mean(name, known)} Expected one of: {', '.join(known)}."
    expected = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if detail["type"] == "missing":
        return f"key {key!r}: found nothing, expected a value."
    if not key or isinstance(detail["input"], Mapping):
        return f"key {key or '(whole card)'!r}: expected {expected}."
    return f"key {key!r}: found {detail['input']!r}, expected {expected}."


def _known_keys(loc: tuple[int | str, ...]) -> list[str]:
    nested: dict[str, type[Table]] = {
        "channels": Channel,
        "links": Link,
        "plan": Plan,
        "structures": StructureOverride,
        "weights": Weights,
    }
    return list((nested[str(loc[0])] if len(loc) > 1 else ModelCard).model_fields)
