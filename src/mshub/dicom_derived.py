"""What DICOM objects made from a label have in common, whatever their kind.

Which structures are in it and what they are called, whose scan it belongs to, who or what made it, and the frame of
reference it lies in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from mshub.dicom_series import SeriesStack
from mshub.errors import CaseError, GeometryError, LabelError
from mshub.geometry import Array
from mshub.image_limits import text_xyz
from mshub.label_rules import listed, refuse_unfit_names
from mshub.structures import Structure, StructureOverride, structures

MANUFACTURER = "MSHub"
SERIAL_NUMBER = "0"  # an attribute that must not be empty; a program has none
#: Derived series are listed behind those of the scanner, each beside the series it was made from.
SERIES_NUMBER_OFFSET = 10_000
LONGEST_NAME = 64  # SegmentLabel and ROIName: DICOM's LO

#: Without these a reader could not tell what the object was made from.
_IDENTIFIERS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")
#: Of patient and study, what DICOM requires, though it may be empty.
_REQUIRED = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
)
_KEPT = (
    *("IssuerOfPatientID", "EthnicGroup", "PatientComments", "PatientIdentityRemoved", "DeidentificationMethod"),
    *("PatientAge", "PatientSize", "PatientWeight", "StudyDescription"),
    *("ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialProtocolName", "ClinicalTrialSiteID"),
    *("ClinicalTrialSiteName", "ClinicalTrialSubjectID", "ClinicalTrialSubjectReadingID"),
    *("ClinicalTrialTimePointID", "ClinicalTrialTimePointDescription"),
)
#: Values of these forms only; anything else becomes empty: strict readers refuse the whole object over a birth date.
_FORMS = {
    "PatientBirthDate": r"\d{8}",
    "StudyDate": r"\d{8}",
    "StudyTime": r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?",
    "PatientSex": r"[MFO]",
    "PatientAge": r"\d{3}[DWMY]",
    "PatientIdentityRemoved": r"YES|NO",
    **dict.fromkeys(("PatientSize", "PatientWeight"), r"(?=.{1,16}$)[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"),
}


@dataclass(frozen=True)
class Algorithm:
    """The model that outlined the structures.

    Attributes
    ----------
    name, version : str
        Of the model.
    edited : bool
        A person has changed or confirmed what it outlined.
    """

    name: str
    version: str
    edited: bool = False


@dataclass(frozen=True)
class Facts:
    """What a derived object says about itself.

    Attributes
    ----------
    algorithm : Algorithm or None
        None where a person drew everything.
    series_description : str
        What lists of series show.
    creator : str
        The person, or the client, that submitted it; may be empty.
    overrides : mapping of str to StructureOverride
        What the model's card says of its structures.
    """

    algorithm: Algorithm | None
    series_description: str
    creator: str = ""
    overrides: Mapping[str, StructureOverride] = field(default_factory=dict)

    @classmethod
    def of_model(
        cls,
        algorithm: Algorithm,
        creator: str = "",
        overrides: Mapping[str, StructureOverride] | None = None,
    ) -> Facts:
        """Return the facts of a label that a model made, and that a person has edited since or not."""
        state = "corrected" if algorithm.edited else "automatic"
        return cls(algorithm, f"MSHub {algorithm.name} {algorithm.version}, {state}", creator, overrides or {})

    @property
    def generation(self) -> str:
        """How the structures came about: AUTOMATIC, SEMIAUTOMATIC or MANUAL."""
        if self.algorithm is None:
            return "MANUAL"
        return "SEMIAUTOMATIC" if self.algorithm.edited else "AUTOMATIC"


@dataclass(frozen=True)
class WrittenObject:
    """UIDs of a DICOM object that was written."""

    series_uid: str
    sop_uid: str


def present_structures(
    labels_xyz: Array, names: Mapping[str, int], overrides: Mapping[str, StructureOverride], kind: str
) -> dict[int, Structure]:
    """Return value -> structure for those of which the label has a voxel, in ascending order of value.

    Parameters
    ----------
    labels_xyz
        Integers, any shape.
    names
        Structure name to its value in the array; names of absent structures too, so that colours stay the same.
    kind
        What is to be written, for the messages: ``"a DICOM SEG"``.

    Raises
    ------
    LabelError
        No voxel at all, a value without a name, names that DICOM cannot hold or nobody could tell apart.
    """
    _check_names(names, kind)
    if not np.issubdtype(labels_xyz.dtype, np.integer):
        raise LabelError(f"The label holds {labels_xyz.dtype} values. Expected: integers. How to fix: round them.")
    found = [int(value) for value in np.unique(labels_xyz) if value != 0]
    described = structures(names, overrides)
    by_value = {value: described[name] for name, value in names.items()}
    if nameless := [value for value in found if value not in by_value]:
        raise LabelError(
            f"The label holds the values {listed(nameless)}, which have no name. Found names for: "
            f"{listed(sorted(by_value))}. How to fix: name every structure."
        )
    if not found:
        raise LabelError(
            f"The label is empty: {kind} needs at least one structure with a voxel. Expected: one of "
            f"{listed(names)}. How to fix: nothing, if there is nothing to outline; keep the label as NRRD or NIfTI."
        )
    return {value: by_value[value] for value in found}


def _check_names(names: Mapping[str, int], kind: str) -> None:
    refuse_unfit_names(list(names))
    unfit = [name for name in names if len(name) > LONGEST_NAME or "\\" in name]
    if unfit:
        raise LabelError(
            f"{kind} cannot hold these names of structures. Found: {listed(map(repr, unfit))}. Expected: at most "
            f"{LONGEST_NAME} characters and no backslash. How to fix: rename them in the model's labels."
        )


def slices_of(labels_xyz: Array, stack: SeriesStack) -> Array:
    """Return the label, refused where it is not one value per pixel of the series.

    Raises
    ------
    GeometryError
        The array's shape is not ``stack.slices_shape``.
    """
    if labels_xyz.shape != stack.slices_shape:
        raise GeometryError(
            f"found a label of {text_xyz(labels_xyz.shape)} voxels, expected {text_xyz(stack.slices_shape)} (columns, "
            "rows, slices of the series); a label on the grid of a tilted series goes through SeriesStack.to_slices"
        )
    return labels_xyz


def check_identified(stack: SeriesStack, kind: str) -> None:
    """Refuse a series without the identifiers by which a derived object refers to it.

    Raises
    ------
    CaseError
        Names the attributes that are missing, or that two slices share.
    """
    missing = [name for name in _IDENTIFIERS if not all(header.get(name) for header in stack.headers)]
    if missing:
        raise CaseError(
            f"the series has no {', '.join(missing)}, expected every slice to have one: {kind} refers to its slices by "
            "them; export the series again without removing UIDs, or write the label as NRRD or NIfTI"
        )
    studies = {(str(header.StudyInstanceUID), str(header.SeriesInstanceUID)) for header in stack.headers}
    if len({str(header.SOPInstanceUID) for header in stack.headers}) < len(stack.headers) or len(studies) > 1:
        raise CaseError(
            f"slices of the series share a SOPInstanceUID or belong to {len(studies)} series or studies, expected one "
            f"UID per slice and one series: {kind} refers to its slices by them; export the series again"
        )


def patient_and_study(stack: SeriesStack) -> Dataset:
    """Return patient and study of the series, in Unicode; values in forms that DICOM does not know become empty."""
    header, kept = stack.headers[0], Dataset()
    kept.SpecificCharacterSet = "ISO_IR 192"
    kept.StudyInstanceUID = str(header.StudyInstanceUID)
    for keyword in _REQUIRED:
        setattr(kept, keyword, _text(header, keyword))
    for keyword in _KEPT:
        if text := _text(header, keyword):
            setattr(kept, keyword, text)
    return kept


def frame_of_reference(stack: SeriesStack) -> str:
    """Return the series' Frame of Reference UID, or one that follows from its own UID where it has none."""
    uid = str(stack.headers[0].get("FrameOfReferenceUID") or "")
    return uid or str(generate_uid(entropy_srcs=[str(stack.headers[0].SeriesInstanceUID), "frame of reference"]))


def series_number(stack: SeriesStack) -> int:
    """Return the number of a series derived from this one."""
    try:
        number = max(int(stack.headers[0].get("SeriesNumber") or 0), 0)
    except (TypeError, ValueError, OverflowError):
        number = 0
    return SERIES_NUMBER_OFFSET + min(number, 2**31 - 1 - SERIES_NUMBER_OFFSET)


def person_name(text: str) -> str:
    """Return a text as a DICOM person name of one component; what would split it is left out."""
    name = _shortened(re.sub(r"[\\^=]", " ", text))
    return f"{name}^" if name else ""


def long_string(text: str) -> str:
    """Return a text as DICOM's LO holds it: one line, one value, at most 64 characters."""
    return _shortened(text.replace("\\", "/"))


def _shortened(text: str) -> str:
    printable = "".join(sign if sign.isprintable() else " " for sign in text)
    return " ".join(printable.split())[: LONGEST_NAME - 1]


def _text(header: Dataset, keyword: str) -> str:
    """Return the value as text, empty where it is missing, damaged or of a form that DICOM does not know."""
    try:
        value = header.get(keyword)
    except Exception:  # pydicom promises no exception type for damaged values
        return ""
    if value is None or (isinstance(value, Sequence) and not isinstance(value, str)):
        return ""
    text = str(value).strip()
    form = _FORMS.get(keyword)
    return text if form is None or re.fullmatch(form, text) else ""
