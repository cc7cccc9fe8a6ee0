"""Which series of a study serves which channel of a model, and how it gets onto the grid of the others.

The series a person looks at is the reference: the label will lie on its grid, and it serves the channel it matches. The
other channels are looked for among the series of the same study that share its frame of reference, that is, its patient
coordinates. Without a shared frame of reference nothing is resampled, whoever asks: the images may lie anywhere to each
other. A choice that evidence does not settle is refused, with a list of the study, never guessed; a person's choice by
hand goes before every evidence but that one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813 -- the name its own documentation uses

from mshub.card_tables import Channel
from mshub.errors import ChannelError, GeometryError
from mshub.geometry import Affine, Grid, Volume, from_sitk, same_grid, to_sitk
from mshub.mr_sequences import Sequence as Taken
from mshub.mr_sequences import description_of, matches, sequence_of, wanted_sequence

__all__ = ["ChannelSeries", "choose_series", "description_of", "resample_to", "sequence_of"]

#: Largest difference between direction cosines of series that are called alike in orientation (0.6 degrees).
SAME_ORIENTATION = 1e-2
#: Share of the reference's volume that a resampled series must cover: with less, a network sees mostly padding.
MIN_OVERLAP = 0.5
#: Points per axis at which the overlap is measured.
_OVERLAP_POINTS = 48

_MODALITY_NAMES = {"CT": "CT", "PET": "PT", "PT": "PT", "SUV": "PT", "US": "US", "MR": "MR", "MRI": "MR"}


@dataclass(frozen=True)
class ChannelSeries:
    """The series that serves one channel.

    Attributes
    ----------
    channel : str
        Name of the channel.
    series_uid : str
        SeriesInstanceUID.
    description : str
        What people call the series.
    sequence : str
        What it was taken for, such as ``T1w contrast-enhanced``; ``CT`` of a CT.
    why : str
        Why this one, one sentence without a full stop.
    """

    channel: str
    series_uid: str
    description: str
    sequence: str
    why: str


def choose_series(
    channels: Sequence[Channel],
    reference: str,
    headers: Mapping[str, Any],
    overrides: Mapping[str, str] | None = None,
    *,
    modality: str | None = None,
) -> tuple[ChannelSeries, ...]:
    """Find the series of every channel.

    Parameters
    ----------
    channels
        Of the model, in its order. An only channel takes the reference, whatever its sequence.
    reference
        SeriesInstanceUID of the series whose grid the label will lie on.
    headers
        SeriesInstanceUID -> pydicom dataset of the series or of one of its instances, for every image series of the
        study, the reference among them. NumberOfSeriesRelatedInstances helps to choose where it is known.
    overrides
        Channel name -> SeriesInstanceUID chosen by hand; empty values count as absent.
    modality
        The model's, for channels that name none.

    Returns
    -------
    tuple of ChannelSeries
        One per channel, in order.

    Raises
    ------
    ChannelError
        A channel that no series, or no single one, matches; another modality or frame of reference; a series that is
        not of the study or asked for twice.
    """
    study = _Study(dict(headers), reference)
    chosen_by_hand = {name: uid for name, uid in (overrides or {}).items() if uid}
    asked = [_Asked.of(channel, modality) for channel in channels]
    _check_overrides(chosen_by_hand, [channel.name for channel in asked], study)
    _check_reference(study)
    found = {
        item.name: _as_told(item, chosen_by_hand[item.name], study) for item in asked if item.name in chosen_by_hand
    }
    if len(asked) == 1 and not found:
        found[asked[0].name] = _only_channel(asked[0], study)
    else:
        open_channels = [channel for channel in asked if channel.name not in found]
        _check_told_apart(open_channels, study)
        found |= _serve_reference(open_channels, found, study)
        for channel in open_channels:
            if channel.name not in found:
                found[channel.name] = _search(channel, found, study)
    for name, item in found.items():
        study.check_frame(name, item.series_uid)
    return tuple(found[channel.name] for channel in asked)


def resample_to(volume: Volume, reference: Grid) -> Volume:
    """Return a volume on another grid of the same patient coordinates.

    Parameters
    ----------
    volume
        Any grid, any real dtype.
    reference
        The grid wanted.

    Returns
    -------
    Volume
        On the very same grid, the same array. Otherwise float32, interpolated linearly (values stay between those of
        the neighbours, which splines do not keep at edges), the volume's minimum outside of it.

    Raises
    ------
    GeometryError
        The volume covers less than `MIN_OVERLAP` of the reference grid.
    """
    if same_grid(volume.grid, reference):
        return Volume(volume.array_xyz, reference)
    _check_overlap(volume.grid, reference)
    image = to_sitk(Volume(volume.array_xyz.astype(np.float32), volume.grid))
    target = to_sitk(Volume(np.empty(reference.shape_xyz, dtype=np.uint8), reference))
    background = float(volume.array_xyz.min())
    resampled = sitk.Resample(image, target, sitk.Transform(), sitk.sitkLinear, background, sitk.sitkFloat32)
    return Volume(from_sitk(resampled).array_xyz, reference)


def overlap(grid: Grid, reference: Grid) -> float:
    """Return the share of a reference grid, 0..1, that another grid covers, measured at evenly spaced voxels."""
    steps = [np.linspace(0, size - 1, min(size, _OVERLAP_POINTS)) for size in reference.shape_xyz]
    points = np.stack([axis.ravel() for axis in np.meshgrid(*steps, indexing="ij")], axis=1)
    to_grid: Affine = np.linalg.inv(grid.affine_ras) @ reference.affine_ras
    indices = points @ to_grid[:3, :3].T + to_grid[:3, 3]
    inside = (indices >= -0.5) & (indices <= np.array(grid.shape_xyz) - 0.5)
    return float(inside.all(axis=1).mean())


def _check_overlap(grid: Grid, reference: Grid) -> None:
    share = overlap(grid, reference)
    if share < MIN_OVERLAP:
        raise GeometryError(
            f"found that the series covers {share:.0%} of the volume of the reference series, expected at least "
            f"{MIN_OVERLAP:.0%}: a model would see nothing elsewhere; start from the series with the smaller field of "
            "view, or choose another series for this channel"
        )


# -- what a channel asks for -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """What one channel asks for: a modality, and of MR a sequence in words; None where nothing says."""

    name: str
    modality: str | None
    sequence: str | None

    @classmethod
    def of(cls, channel: Channel, modality: str | None) -> _Asked:
        """Read a channel: its own keys first, then its name, then the modality of its model."""
        words = channel.sequence or channel.name
        sequence = words if wanted_sequence(words) else None
        named = _MODALITY_NAMES.get(channel.name.upper()) or ("MR" if sequence else None)
        kind = channel.modality or named or modality
        return cls(channel.name, None if kind == "other" else kind, sequence if kind == "MR" else None)

    @property
    def says_something(self) -> bool:
        """Whether series can be told apart by what it asks for."""
        return self.sequence is not None or self.modality not in (None, "MR")

    @property
    def wanted(self) -> str:
        """What to call it in a message."""
        return self.sequence or self.modality or "no sequence that is known"

    def fits(self, header: Any, taken: Taken) -> bool:
        """Whether a series is what the channel asks for."""
        if self.sequence is not None:
            return matches(self.sequence, taken)
        return self.modality not in (None, "MR") and taken.kind == self.modality

    def same_as(self, other: _Asked) -> bool:
        """Whether two channels ask for one thing."""
        return self._key() == other._key()

    def _key(self) -> tuple[object, ...]:
        sequence = wanted_sequence(self.sequence) if self.sequence else None
        return (self.modality, sequence and (sequence.kind, bool(sequence.contrast)))


class _Study:
    """The series of a study, what each was taken for, and which is the reference."""

    def __init__(self, headers: Mapping[str, Any], reference: str) -> None:
        self.headers = headers
        self.reference = reference
        self.taken = {uid: sequence_of(header) for uid, header in headers.items()}

    def serve(self, channel: str, uid: str, why: str) -> ChannelSeries:
        """Return the entry of a channel that this series serves."""
        header, taken = self.headers[uid], self.taken[uid]
        return ChannelSeries(channel, uid, description_of(header), taken.name, why)

    def frame(self, uid: str) -> str:
        """Return the FrameOfReferenceUID of a series, empty where it has none."""
        return str(self.headers[uid].get("FrameOfReferenceUID") or "").strip()

    def shares_frame(self, uid: str) -> bool:
        """Whether a series lies in the patient coordinates of the reference."""
        return uid == self.reference or (self.frame(uid) == self.frame(self.reference) != "")

    def check_frame(self, channel: str, uid: str) -> None:
        """Refuse a series that lies in other coordinates than the reference."""
        if not self.shares_frame(uid):
            raise ChannelError(
                f"channel {channel!r}: found {self.describe(uid)} in {self._frame_text(uid)}, expected the reference's "
                f"({self._frame_text(self.reference)}): where it lies to the reference is not known; register it to "
                "the reference, e.g. with 3D Slicer, or choose a series of the same examination"
            )

    def _frame_text(self, uid: str) -> str:
        return f"the frame of reference {self.frame(uid)}" if self.frame(uid) else "no frame of reference"

    def describe(self, uid: str) -> str:
        """Return a series as a reader knows it, with what it was taken for."""
        name = description_of(self.headers[uid]) or "no description"
        return f"{name!r} ({self.taken[uid].name}, {uid})"

    def listing(self) -> str:
        """Return all series in one line."""
        return "the study has " + "; ".join(self.describe(uid) for uid in self.headers)


def _by_hand(channel: str) -> str:
    return f'choose it by hand: "series": {{"{channel}": "its SeriesInstanceUID"}}'


# -- refusals ----------------------------------------------------------------------------------------------------------


def _check_reference(study: _Study) -> None:
    if study.reference not in study.headers:
        raise ChannelError(
            f"found no image series {study.reference} in its study, expected it there; {study.listing()}; open the "
            "study again, it may have changed in the PACS"
        )


def _check_overrides(overrides: Mapping[str, str], names: list[str], study: _Study) -> None:
    for name, uid in overrides.items():
        if name not in names:
            raise ChannelError(
                f"found a series chosen for channel {name!r}, expected one of {', '.join(names)}; correct the name"
            )
        if uid not in study.headers:
            raise ChannelError(
                f"channel {name!r}: found no series {uid} in the study, expected one of its series; "
                f"{study.listing()}; choose one of them"
            )
    doubled = [name for name, uid in overrides.items() if list(overrides.values()).count(uid) > 1]
    if doubled:
        raise ChannelError(
            f"found {study.describe(overrides[doubled[0]])} chosen for the channels {', '.join(doubled)}, expected "
            f"one series per channel; {study.listing()}; choose another for one of them"
        )


def _check_told_apart(channels: list[_Asked], study: _Study) -> None:
    """Refuse channels that say nothing, or the same as another one."""
    for index, channel in enumerate(channels):
        if not channel.says_something:
            raise ChannelError(
                f"channel {channel.name!r}: found no sequence in its name, expected one such as T1, T1c, T2, FLAIR or "
                f"ADC; {study.listing()}; give 'sequence' in the model's card, or {_by_hand(channel.name)}"
            )
        if twin := next((other for other in channels[:index] if channel.same_as(other)), None):
            raise ChannelError(
                f"found that the channels {twin.name!r} and {channel.name!r} both ask for {channel.wanted}, expected "
                f"one of them to be chosen; {study.listing()}; {_by_hand(channel.name)}"
            )


# -- the choice --------------------------------------------------------------------------------------------------------


def _as_told(channel: _Asked, uid: str, study: _Study) -> ChannelSeries:
    """Return the series chosen by hand; that it looks wrong is said, and no more."""
    doubtful = channel.says_something and not channel.fits(study.headers[uid], study.taken[uid])
    doubt = f", though the model asks for {channel.wanted} and it was taken for {study.taken[uid].name}"
    return study.serve(channel.name, uid, "chosen by hand" + doubt * doubtful)


def _only_channel(channel: _Asked, study: _Study) -> ChannelSeries:
    """Return the reference for a model of one channel, unless it is of another modality."""
    header, taken = study.headers[study.reference], study.taken[study.reference]
    found = str(header.get("Modality") or "").strip()
    if channel.modality and found and found != channel.modality:
        raise ChannelError(
            f"channel {channel.name!r}: found {study.describe(study.reference)}, a {found} series, expected "
            f"{channel.modality}: the model has never seen {found}; open a {channel.modality} series, or, to try it "
            f"all the same, {_by_hand(channel.name)}"
        )
    why = "the series asked for"
    if channel.sequence and not channel.fits(header, taken):
        why += f", though the model was made for {channel.sequence} and this was taken for {taken.name} ({taken.why})"
    return study.serve(channel.name, study.reference, why)


def _serve_reference(
    channels: list[_Asked], found: Mapping[str, ChannelSeries], study: _Study
) -> dict[str, ChannelSeries]:
    """Return the channel that the reference serves, or nothing where it was given one by hand already."""
    uid = study.reference
    if not channels or any(item.series_uid == uid for item in found.values()):
        return {}
    taken = study.taken[uid]
    fitting = [channel for channel in channels if channel.fits(study.headers[uid], taken)]
    if not fitting:
        wanted = ", ".join(f"{channel.name} ({channel.wanted})" for channel in channels)
        raise ChannelError(
            f"found the series {study.describe(uid)}, which serves none of the channels ({taken.why}), expected one "
            f"of {wanted}; {study.listing()}; start from one that serves a channel, or {_by_hand(channels[0].name)}"
        )
    # channels that ask for the same were refused before
    return {fitting[0].name: study.serve(fitting[0].name, uid, f"the series asked for: {taken.why}")}


def _search(channel: _Asked, found: Mapping[str, ChannelSeries], study: _Study) -> ChannelSeries:
    """Return the best series of the study for a channel."""
    used = {item.series_uid for item in found.values()}
    fitting = [uid for uid in study.headers if uid not in used and channel.fits(study.headers[uid], study.taken[uid])]
    candidates = [uid for uid in fitting if study.shares_frame(uid)]
    if not candidates:
        for uid in fitting:
            study.check_frame(channel.name, uid)
        raise ChannelError(
            f"channel {channel.name!r}: found no {channel.wanted} series in the study, expected one; "
            f"{study.listing()}; send the missing series to the PACS, or, if it is one of these, "
            f"{_by_hand(channel.name)}"
        )
    best, reason = _best(candidates, study)
    if best is None:
        raise ChannelError(
            f"channel {channel.name!r}: found {len(candidates)} {channel.wanted} series that nothing tells apart "
            f"({'; '.join(study.describe(candidate) for candidate in candidates)}), expected one; "
            f"{_by_hand(channel.name)}"
        )
    why = study.taken[best].why
    return study.serve(channel.name, best, f"{why}; {reason}" if reason else why)


_Measure = Callable[[Any, Any, Taken], float | str | None]  # header, header of the reference, what it was taken for


def _best(candidates: list[str], study: _Study) -> tuple[str | None, str]:
    """Return the best candidate and what set it apart; None where nothing does.

    A criterion counts only where all candidates can be measured by it: an absent attribute is no argument.
    """
    count, left, reasons = len(candidates), candidates, []
    reference = study.headers[study.reference]
    for reason, measure in _CRITERIA:
        if len(left) == 1:
            break
        values = {uid: measure(study.headers[uid], reference, study.taken[uid]) for uid in left}
        known = [value for value in values.values() if value is not None]
        if len(known) < len(left):
            continue
        best = max(known)  # type: ignore[type-var]  # of one criterion all values are of one type
        kept = [uid for uid in left if values[uid] == best]
        if len(kept) < len(left):
            reasons.append(reason)
        left = kept
    if len(left) > 1:
        return None, ""
    return left[0], f"of {count} such series the one that {' and '.join(reasons)}" if reasons else ""


def _is_oriented_alike(header: Any, reference: Any, _: Taken) -> float | None:
    here, there = (_numbers(item, "ImageOrientationPatient", 6) for item in (header, reference))
    if here is None or there is None:
        return None
    return float(max(abs(a - b) for a, b in zip(here, there, strict=True)) <= SAME_ORIENTATION)


def _has_alike_pixels(header: Any, reference: Any, _: Taken) -> float | None:
    here, there = (_pixels(item) for item in (header, reference))
    return None if here is None or there is None else float(np.allclose(here, there, rtol=1e-3, atol=0))


def _slices(header: Any, _: Any, taken: Taken) -> float | None:
    """Return the number of slices; None of what holds several volumes in one series, where more is no better."""
    if taken.kind in ("DWI", "perfusion"):
        return None
    value = _numbers(header, "NumberOfSeriesRelatedInstances", 1) or _numbers(header, "ImagesInAcquisition", 1)
    return value[0] if value else None


def _fineness(header: Any, _: Any, __: Taken) -> float | None:
    pixels = _numbers(header, "PixelSpacing", 2)
    thickness = _numbers(header, "SpacingBetweenSlices", 1) or _numbers(header, "SliceThickness", 1)
    return -round(pixels[0] * pixels[1] * abs(thickness[0]), 6) if pixels and thickness else None


def _is_original(_: Any, __: Any, taken: Taken) -> float:
    return float(taken.original)


def _time(header: Any, _: Any, __: Taken) -> str | None:
    """Return when a series was made, as digits that sort; None where it does not say."""
    for what in ("Acquisition", "Series", "Content"):
        date, time = (str(header.get(f"{what}{unit}") or "") for unit in ("Date", "Time"))
        if time:
            return f"{date:8}{time}"
    return None


_CRITERIA: tuple[tuple[str, _Measure], ...] = (
    ("lies in the plane of the reference", _is_oriented_alike),
    ("has the pixels of the reference", _has_alike_pixels),
    ("has most slices", _slices),
    ("has the finest voxels", _fineness),
    ("is no reformat", _is_original),
    ("was made last", _time),
)


def _pixels(header: Any) -> list[float] | None:
    """Return columns, rows and pixel spacing; None where one of them is absent."""
    parts = [_numbers(header, keyword, n) for keyword, n in (("Columns", 1), ("Rows", 1), ("PixelSpacing", 2))]
    return None if None in parts else [value for part in parts if part for value in part]


def _numbers(header: Any, keyword: str, count: int) -> list[float] | None:
    """Return the numbers of an attribute; None where it is absent, damaged or of another length."""
    try:
        value = header.get(keyword)
        values = [float(item) for item in (value if count > 1 else [value])]
    except Exception:  # pydicom promises no exception type for damaged values
        return None
    return values if len(values) == count else None
