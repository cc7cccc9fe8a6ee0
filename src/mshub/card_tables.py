"""The tables of a model card: channels, links, where the weights are, the plan of weights that come without one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Modality = Literal["CT", "MR", "PT", "US", "other"]
WeightsKind = Literal["gdrive-folder", "gdrive-file", "https", "bundled"]

Text = Annotated[str, Field(min_length=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[int, Field(ge=1)]
Millimetres = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Channel(Table):
    """One input image of a model.

    Attributes
    ----------
    name : str
        Name of the channel, as in ``dataset.json``.
    modality : str or None
        Where it differs from the card's, as in PET/CT.
    sequence : str or None
        MR sequence, such as ``T1w contrast-enhanced``.
    """

    name: Text
    modality: Modality | None = None
    sequence: Text | None = None


class Link(Table):
    """A publication or page about a model."""

    title: Text
    url: Annotated[str, Field(pattern=r"^https?://\S+$")]


class Weights(Table):
    """Where the weights are.

    Attributes
    ----------
    kind : str
        ``gdrive-folder`` and ``gdrive-file`` need `id`, ``https`` needs `url`, ``bundled`` (with MSHub) neither.
    id : str or None
        Google Drive id.
    url : str or None
        Address of an archive.
    sha256 : str or None
        Of the downloaded file, 64 lower-case hex digits, where known.
    """

    kind: WeightsKind
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] | None = None
    url: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _has_its_address(self) -> Weights:
        needed = {"gdrive-folder": {"id"}, "gdrive-file": {"id"}, "https": {"url"}, "bundled": set()}[self.kind]
        found = {key for key in ("id", "url") if getattr(self, key) is not None}
        if found != needed:
            raise ValueError(f"kind {self.kind!r} with {_these(needed)}, found {_these(found)}")
        return self

    @property
    def page(self) -> str | None:
        """Address a person can open in a browser; None for bundled weights."""
        if self.kind == "gdrive-folder":
            return f"https://drive.google.com/drive/folders/{self.id}"
        if self.kind == "gdrive-file":
            return f"https://drive.google.com/file/d/{self.id}/view"
        return self.url


class Plan(Table):
    """What nnU-Net v1's plans would say about a bare state file, as its makers publish it.

    Axes are z, y, x. Kernels and strides are in the weights themselves: they are named to be checked.

    Attributes
    ----------
    labels : tuple of str
        Structures in ascending order of value, without background.
    channels : tuple of str
        Input images in order.
    features : int
        Feature maps of the first level.
    patch_size : tuple of int
        Voxels of one tile.
    spacing : tuple of three float
        Voxel size the network sees, mm.
    normalization : str
        v1's scheme of every channel: ``nonCT`` (z-score of the image) or ``noNorm``.
    mask_for_norm : bool
        Normalise by the voxels that are not zero.
    resampling_order, resampling_order_z : int
        Spline orders of image resampling; `resampling_order_z` through the thick slices.
    separate_z : bool or None
        Whether thick slices are resampled apart; None decides by the spacing, as nnU-Net does.
    mirroring : bool
        The release averages over flips.
    pools, kernels : tuple of tuple of int, or None
        Strides between levels; encoder kernels per level.
    """

    labels: Annotated[tuple[Text, ...], Field(min_length=1)]
    channels: Annotated[tuple[Text, ...], Field(min_length=1)]
    features: Size
    patch_size: Annotated[tuple[Size, ...], Field(min_length=2, max_length=3)]
    spacing: tuple[Millimetres, Millimetres, Millimetres]
    normalization: Literal["nonCT", "noNorm"] = "nonCT"
    mask_for_norm: bool = False
    resampling_order: Annotated[int, Field(ge=0, le=5)] = 3
    resampling_order_z: Annotated[int, Field(ge=0, le=5)] = 0
    separate_z: bool | None = None
    mirroring: bool = True
    pools: tuple[tuple[Size, ...], ...] | None = None
    kernels: tuple[tuple[Size, ...], ...] | None = None


@dataclass(frozen=True)
class InputRules:
    """What is done to every image before nnU-Net sees it.

    Attributes
    ----------
    clip : (float, float) or None
        Low and high in the image's own units (HU for CT): intensities are truncated to them.
    orientation : str or None
        Axis codes such as ``RAS``, the directions x, y and z point to: the image is turned to them by flips and
        permutations of its axes. None leaves it as it is stored.
    """

    clip: tuple[float, float] | None = None
    orientation: str | None = None


AS_STORED = InputRules()


def _these(keys: set[str]) -> str:
    return " and ".join(map(repr, sorted(keys))) or "neither 'id' nor 'url'"
