"""What an MR series is: T1w, FLAIR, ADC..., read from its DICOM attributes.

No attribute says it in a coded way that scanners keep to. People write it into the description, so words come first:
those of the series, then those of its protocol (which on GE scanners names the whole examination: not read there).
Where words say nothing, physics does: echo, repetition and inversion time. Whether a contrast agent was given is read
in the same order, and last in ContrastBolusAgent, which scanners fill in for series before the injection, too.

Times are in ms, b-values in s/mm2, as DICOM has them.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

__all__ = ["Sequence", "description_of", "matches", "sequence_of", "wanted_sequence"]

T1, T2, FLAIR, PD, STIR = "T1w", "T2w", "FLAIR", "PD", "STIR"
T2_STAR, SWI, DWI, ADC = "T2*", "SWI", "DWI", "ADC"
PERFUSION, ANGIOGRAPHY, LOCALIZER = "perfusion", "angiography", "localizer"
DERIVED, OTHER, UNKNOWN = "derived", "other", "unknown"

#: Inversion times in ms: what nulls fluid (FLAIR), what nulls fat (STIR), what weights by T1.
FLUID_INVERSION_MS = 1500.0
FAT_INVERSION_MS = (80.0, 350.0)
#: Spin echoes in ms: T1w repeats faster than the first, T2w and PD slower than the second; T2w echoes later than the
#: third, T1w and PD earlier than the fourth. Between them nothing is said.
SHORT_TR_MS, LONG_TR_MS, LONG_TE_MS, SHORT_TE_MS = 1200.0, 1500.0, 60.0, 50.0
T1_TE_MS = 30.0
#: Gradient echoes in ms: later than this they are T2*-weighted, earlier than the other T1-weighted.
LATE_GRADIENT_ECHO_MS, EARLY_GRADIENT_ECHO_MS = 14.0, 8.0


@dataclass(frozen=True)
class Sequence:
    """What a series was taken for.

    Attributes
    ----------
    kind : str
        ``T1w``, ``T2w``, ``FLAIR``, ``PD``, ``STIR``, ``T2*``, ``SWI``, ``DWI``, ``ADC``, ``perfusion``,
        ``angiography``, ``localizer``, ``derived`` (subtractions, projections, maps), ``other`` or ``unknown``; of
        other modalities the modality.
    contrast : bool or None
        Whether a contrast agent had been given; None where nothing says so.
    original : bool
        Not computed from other images: no reformat, no map.
    why : str
        The evidence, as one sentence without a full stop.
    """

    kind: str
    contrast: bool | None = None
    original: bool = True
    why: str = ""

    @property
    def name(self) -> str:
        """What to call it: the kind, and for T1w whether it is contrast-enhanced."""
        return f"{T1} contrast-enhanced" if self.kind == T1 and self.contrast else self.kind


def sequence_of(dataset: Any) -> Sequence:
    """Say what a series is.

    Parameters
    ----------
    dataset : pydicom.Dataset
        Attributes of the series or of one of its instances, however few: from a file or from DICOM JSON.
    """
    modality = _text(dataset, "Modality")
    image_type = tuple(item.upper() for item in _texts(dataset, "ImageType"))
    if "LOCALIZER" in image_type:
        return Sequence(LOCALIZER, why="ImageType has LOCALIZER")
    original = image_type[:1] != ("DERIVED",)
    if modality not in ("MR", ""):
        return Sequence(modality, original=original, why=f"Modality is {modality}")
    kind, kind_why = _kind_of(dataset, image_type)
    contrast, contrast_why = _contrast_of(dataset) if kind not in (LOCALIZER, DERIVED, UNKNOWN) else (None, "")
    original = original and not _REFORMATTED.search(_plain(_text(dataset, "SeriesDescription")))
    return Sequence(kind, contrast, original, "; ".join(filter(None, (kind_why, contrast_why))))


def matches(wanted: str, found: Sequence) -> bool:
    """Whether a series is what a channel asks for.

    Parameters
    ----------
    wanted
        A card's `sequence` of a channel or the channel's name, in any usual spelling: ``T1``, ``t1ce``, ``t2f``,
        ``T1w contrast-enhanced``. T1w without a word on contrast means before contrast.
    found
        What the series was taken for.
    """
    asked = wanted_sequence(wanted)
    if asked is None or asked.kind != found.kind:
        return False
    as_enhanced = bool(found.contrast) == bool(asked.contrast)
    return as_enhanced or (asked.kind != T1 and not asked.contrast)


@lru_cache
def wanted_sequence(wanted: str) -> Sequence | None:
    """Return what a card's `sequence`, or the name of a channel, asks for; None where it names no sequence."""
    text = _plain(wanted)
    kind = _kind_in(text)
    if kind in (None, LOCALIZER, DERIVED, OTHER):
        return None
    return Sequence(str(kind), _contrast_in(text), why=f"{wanted!r} names it")


def description_of(dataset: Any) -> str:
    """Return what people call a series: its description, else its protocol, else its number."""
    number = _text(dataset, "SeriesNumber")
    named = _text(dataset, "SeriesDescription") or _text(dataset, "ProtocolName")
    return named or (f"series {number}" if number else "")


# -- words -------------------------------------------------------------------------------------------------------------


def _words(alternatives: str) -> re.Pattern[str]:
    """Compile alternatives that are whole words in a text as `_plain` leaves it; digits may follow."""
    return re.compile(rf"(?<![a-z0-9])(?:{alternatives})(?![a-z])")


_AGENT = (
    r"(?:contrast\w*|contr|kontrast\w*|gd|gad|gado\w*|km|ce|inj\w*|mdc|civ|dotarem|magnevist|multihance|prohance|"
    r"omniscan|clariscan|eovist|primovist|agent)"
)
_BEFORE = r"(?:without|no|non|not|pre|vor|ohne|sans|senza|sin|zonder|before|avant|voor)(?: (?:iv|i v|the|le|any))?"
# what follows "pre" and "post" where they speak of something else than an injection
_NOT_INJECTED = (
    r"(?! ?(?:op|ops|operativ\w*|surg\w*|rt|xrt|radiat\w*|radio\w*|tx|treat\w*|therap\w*|chemo\w*|biopsy|bx|proc\w*|"
    r"fossa|resect\w*|stroke|trauma\w*|ictal|mortem|embol\w*|sbrt|srs)(?![a-z]))"
)
_NO_SATURATION = r"(?! ?(?:sat|pulse|scan|stim\w*)(?![a-z]))"
_PHASE = r"(?:arterial|art|portal|portovenous|venous|delayed|late|equilibrium|hepatobiliary)(?: venous)? phase|hbp"
_BOTH = re.compile(rf"withandwithout(?: (?:iv )?{_AGENT})?")
_NO_CONTRAST = _words(
    rf"{_BEFORE} ?{_AGENT}|without$|nocontrast|pre{_NOT_INJECTED}{_NO_SATURATION}|nati(?:v|ve|ef|vo|va)|blanco|plain|"
    r"unenhanced|non ?enhanced|unenh|\w*平扫"
)
_CONTRAST = _words(
    rf"pluscontrast|post{_NOT_INJECTED}|post ?{_AGENT}|(?<!phase )(?<!transfer ){_AGENT}|enhanced|enh|{_PHASE}|\w*增强"
)
_REFORMATTED = _words(r"mprs?|reformat\w*|refmt|reform|recon\w*|resampled|d?reg|coreg\w*")

#: The first that is found decides. T1, T2 and PD come after all of them.
_FIRST_WORDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        LOCALIZER,
        _words(
            r"3 ?pl(?:ane)?|\w*scouts?|\w*locali[sz]er\w*|locs?|locator|lokali[sz]\w*|survey\w*|surv|topogram|pilot|"
            r"u?ebersicht|ubersicht\w*|overzicht|reperage|\w*定位\w*|"
            r"calibration|cal|ref ?scan|field ?map\w*|b[01] ?map|shim|smartbrain"
        ),
    ),
    (
        DERIVED,
        _words(
            r"subs?|subt|subtr\w*|difference|m?mips?|minip|min ip|eadc|exponential|c?fa(?! ?\d)|colou?r (?:fa|map)|"
            r"tensor|tract\w*|(?:t[12]|t2star|r2|r2star|pdff|fat) ?maps?|t1 ?rho|fat fraction|pdff|qsm|"
            r"(?:r|rel)?cbv|(?:r|rel)?cbf|mtt|ttp|tmax|ktrans|kep|leakage|pei|washin|washout|"
            r"fusion|fused|overlay|screen ?(?:save|shot|capture)s?|report|key images?|segmentation"
        ),
    ),
    (ADC, _words(r"[ad]?adc|apparent diffusion coefficient|average dc")),
    (
        DWI,
        _words(
            r"\w{0,3}dwi|dwibs|s?dw|\w*diffusion\w*|diffusie\w*|difus\w*|diff|dti|trace\w*|resolve|hbv|ivim|b ?\d{3,4}|"
            r"\w*(?:弥散|扩散)\w*"
        ),
    ),
    (PERFUSION, _words(r"perf|perfus\w*|dsc|dce|p?c?asl|pwi|arterial spin|\w*灌注\w*")),
    (
        OTHER,
        _words(
            r"bold|r?s?fmri|resting state|spectro\w*|mrs|csi|mrcp|fiesta|ciss|trufi|truefisp|b ?ffe|b ?tfe|bssfp|"
            r"inv[12]|mag|pha|phase image|dixon (?:\w+ )?f(?:at)?|fat only|elasto\w*|mre"
        ),
    ),
    (ANGIOGRAPHY, _words(r"tof|mra|mrv|angio\w*|phase contrast|pc[23]d|[23]d ?pc|pca|tricks|twist(?! vibe)")),
    (SWI, _words(r"swip?|swi3d\w*|swan|suscept\w*|venbold|\w*磁敏感\w*")),
)
_FLAIR = re.compile(r"flair|dark ?fluid|(?<![a-z])da ?fl(?![a-z])|fluid atten|压水")
_STIR, _TIR = _words("stir"), _words("tirm?")
_T2_STAR = _words("t2star|t2s|ha?emo|heme|merge|medic")
_GRADIENT = _words("m?e?gre|ffe|fl[23]d|flash|grass|mpgr")
_T1, _T2, _PD = _words("t1"), _words("t2"), _words("pd|pdwi?|proton density|protonendichte|dp")
_T1_TECHNIQUES = _words(r"m?e?mp ?2?rage|f?spgr\w*|bravo|vibe|lava|e?thrive|tfl3d|tfe|ir ?prep\w*")
_T2_TECHNIQUES = _words("haste|ssfse|ss ?tse")

_PLANES = r"(?:ax|axial|axi|sag|sagittal|cor|coronal|tra|trans|transversal|transverse|obl|3d|2d|se|tse|fse|ir|ce)"
_REWRITTEN: tuple[tuple[str, str], ...] = (
    ("_", " "),
    (r"\bw(?:ith)?\s*/?\s*(?:&|and|\+|/)?\s*w(?:ith)?\s*/?\s*o(?:ut)?\b", " withandwithout "),
    (r"\bw\s*/?\s*o\b", " without "),
    (r"\bw\s*/(?=\s|[a-z])", " with "),
    # levels of the spine, such as C2-T1, are no weighting
    (r"\b(?:[cl]\d{1,2}\s*(?:-|to)\s*t\d{1,2}|t\d{1,2}\s*(?:-|to)\s*(?:[cls]\d{1,2}|t(?:[3-9]|1[0-2])))\b", " "),
    # what an image was registered to is not what it is
    (r"\b(?:(?:co)?reg\w*|resampled|warped|aligned)[\s-]*(?:to|onto|2)[\s-]*t[12][a-z]*", " reg "),
    (r"\b(?:to|onto)[\s-]+t[12]\w*|(?<=[a-z])2t[12]\w*", " reg "),
    (r"t2w?\s?\*|\bt2[\s-]?star", " t2star "),
    (r"\+\s*(?:c|gd|gad|gado|km|ce|contrast)(?![a-z])|(?<![a-z0-9])c\s?\+", " pluscontrast "),
    (r"(?<![a-z0-9])c-(?![a-z0-9])|(?<=\s)-c(?![a-z0-9])", " nocontrast "),
    (r"(?<![a-z0-9])t1w?[\s-]?c(?![a-z0-9])", " t1 pluscontrast "),
    (r"(?<![a-z0-9])t1n(?![a-z0-9])", " t1 nocontrast "),
    (r"(?<![a-z0-9])t2f(?![a-z0-9])", " t2 flair "),
    (r"[^\w+]", " "),
    (rf"(?<![a-z0-9])({_PLANES}?)(t[12])(?![0-9])(?!star)(?:weighted|wi(?!th)|w)?", r"\1 \2 "),
    (r"\s+", " "),
)


@lru_cache(maxsize=1024)
def _plain(text: str) -> str:
    """Return a text in small letters without accents and separators, its usual spellings rewritten as plain words."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(sign for sign in letters if not unicodedata.combining(sign))
    for pattern, replacement in _REWRITTEN:
        plain = re.sub(pattern, replacement, plain)
    return plain.strip()


def _kind_in(text: str) -> str | None:
    """Return the kind that a plain text names, or None where it names none, or two that exclude each other."""
    for kind, pattern in _FIRST_WORDS:
        if pattern.search(text):
            return kind
    t1, t2 = bool(_T1.search(text)), bool(_T2.search(text))
    if _T2_STAR.search(text) or (t2 and not t1 and _GRADIENT.search(text)):
        return T2_STAR
    if _STIR.search(text):
        return STIR
    if _FLAIR.search(text):
        return T1 if t1 and not t2 else FLAIR
    return _weighting_in(text, t1, t2)


def _weighting_in(text: str, t1: bool, t2: bool) -> str | None:
    named = {T1: t1, T2: t2, PD: bool(_PD.search(text))}
    if any(named.values()):
        kinds = [kind for kind, is_named in named.items() if is_named]
        only = kinds[0] if len(kinds) == 1 else None
        return None if only == T2 and _TIR.search(text) else only  # fluid or fat is nulled: the inversion time tells
    if _T1_TECHNIQUES.search(text):
        return T1
    return T2 if _T2_TECHNIQUES.search(text) else None


def _contrast_in(text: str) -> bool | None:
    """Return what a plain text says on contrast; None where it says nothing, or both."""
    text = _BOTH.sub(" ", text)
    without = bool(_NO_CONTRAST.search(text))
    given = bool(_CONTRAST.search(_NO_CONTRAST.sub(" ", text)))
    return given if given != without else None


# -- a series ----------------------------------------------------------------------------------------------------------


def _kind_of(dataset: Any, image_type: tuple[str, ...]) -> tuple[str, str]:
    """Return the kind of a series and the evidence."""
    if found := _kind_by_type(image_type):
        return found
    for keyword in _spoken(dataset):
        value = _text(dataset, keyword)
        if kind := _kind_in(_plain(value)):
            return _corrected(kind, dataset, f"{keyword} {value!r} says {kind}")
    return _kind_by_physics(dataset)


def _spoken(dataset: Any) -> tuple[str, ...]:
    """Return the keywords of attributes in which people describe a series, the most telling first."""
    of_the_examination = _text(dataset, "Manufacturer").upper().startswith("GE")
    return ("SeriesDescription",) if of_the_examination else ("SeriesDescription", "ProtocolName")


_TYPES: tuple[tuple[str, frozenset[str]], ...] = (
    (DERIVED, frozenset({"SUBTRACTION", "SUB", "SUBTRACT", "SCREEN SAVE", "PROJECTION IMAGE"})),
    (DERIVED, frozenset({"MIP", "CSA MIP", "MIN IP", "MNIP", "T1 MAP", "T2 MAP", "T2_STAR MAP", "R2_STAR MAP"})),
    (DERIVED, frozenset({"FA", "EADC", "RCBV", "RCBF", "MTT", "TTP"})),
    (OTHER, frozenset({"PHASE", "PHASE MAP", "P"})),
    (ADC, frozenset({"ADC", "ADC_UNSPECIFIED"})),
)


def _kind_by_type(image_type: tuple[str, ...]) -> tuple[str, str] | None:
    """Return the kind where ImageType settles it, whatever the words say: they are often those of the source."""
    for kind, values in _TYPES:
        if said := values.intersection(image_type[2:]):
            return kind, f"ImageType has {min(said)}"
    return None


def _corrected(kind: str, dataset: Any, why: str) -> tuple[str, str]:
    """Return FLAIR for what is called T2w but nulls fluid."""
    inversion = _number(dataset, "InversionTime")
    if kind == T2 and "IR" in _texts(dataset, "ScanningSequence") and inversion and inversion >= FLUID_INVERSION_MS:
        return FLAIR, f"{why}, and its inversion time of {inversion:g} ms nulls fluid"
    return kind, why


def _kind_by_physics(dataset: Any) -> tuple[str, str]:
    """Return the kind that the timing implies."""
    names = _text(dataset, "SequenceName").casefold() + " " + _text(dataset, "PulseSequenceName").casefold()
    if (b_value := _number(dataset, "DiffusionBValue")) is not None:
        return DWI, f"DiffusionBValue is {b_value:g}"
    if re.search(r"ep_b\d", names):
        return DWI, f"SequenceName is {names.strip()!r}"
    if _text(dataset, "AngioFlag").upper() == "Y":
        return ANGIOGRAPHY, "AngioFlag is Y"
    echo, repetition = _number(dataset, "EchoTime"), _number(dataset, "RepetitionTime")
    if not echo or not repetition:
        return UNKNOWN, "neither its description nor its echo and repetition times say what it is"
    inversion = _number(dataset, "InversionTime") or 0.0
    kind = _kind_by_timing(_texts(dataset, "ScanningSequence"), dataset, echo, repetition, inversion)
    times = f"TE {echo:g}, TR {repetition:g}" + (f", TI {inversion:g}" if inversion else "") + " ms"
    return kind, f"{times} are those of {kind}" if kind != UNKNOWN else f"{times} are those of no known sequence"


def _kind_by_timing(scanning: tuple[str, ...], dataset: Any, echo: float, repetition: float, inversion: float) -> str:
    if "EP" in scanning:
        return UNKNOWN
    if "GR" in scanning and "SE" not in scanning:
        return _kind_of_gradient_echo(dataset, echo, inversion)
    if "IR" in scanning and not inversion:
        return UNKNOWN
    if inversion >= FLUID_INVERSION_MS:
        return FLAIR if echo >= LONG_TE_MS else UNKNOWN
    if FAT_INVERSION_MS[0] <= inversion <= FAT_INVERSION_MS[1]:
        return STIR
    if inversion > FAT_INVERSION_MS[1]:
        return T1 if echo <= T1_TE_MS else UNKNOWN
    return _kind_of_spin_echo(echo, repetition)


def _kind_of_gradient_echo(dataset: Any, echo: float, inversion: float) -> str:
    """Return T2* for late echoes, T1w for early ones that are spoiled or prepared by an inversion."""
    variant = set(_texts(dataset, "SequenceVariant"))
    if echo >= LATE_GRADIENT_ECHO_MS:
        return T2_STAR
    if "SS" in variant and not variant & {"SP", "MP"}:
        return OTHER  # balanced: T2 over T1
    spoiled = bool(variant & {"SP", "MP"}) or inversion > FAT_INVERSION_MS[1]
    return T1 if echo <= EARLY_GRADIENT_ECHO_MS and spoiled else UNKNOWN


def _kind_of_spin_echo(echo: float, repetition: float) -> str:
    if repetition <= SHORT_TR_MS:
        return T1 if echo <= T1_TE_MS else UNKNOWN
    if repetition < LONG_TR_MS or SHORT_TE_MS < echo < LONG_TE_MS:
        return UNKNOWN
    return T2 if echo >= LONG_TE_MS else PD


def _contrast_of(dataset: Any) -> tuple[bool | None, str]:
    """Return whether a contrast agent had been given, and the evidence."""
    for keyword in _spoken(dataset):
        value = _text(dataset, keyword)
        contrast = _contrast_in(_plain(value))
        if contrast is not None:
            return contrast, f"{keyword} {value!r} says {'after' if contrast else 'before'} contrast"
    agent = _text(dataset, "ContrastBolusAgent")
    if agent and not _NO_AGENT.fullmatch(agent.strip()):
        return True, f"ContrastBolusAgent is {agent!r}"
    return None, ""


_NO_AGENT = re.compile(r"(?i)(?:no|none|non|n/?a|nil|null|keine?|without|geen|sans|0|-+|no contrast|unknown)?")


# -- attributes --------------------------------------------------------------------------------------------------------


def _texts(dataset: Any, keyword: str) -> tuple[str, ...]:
    """Return the values of an attribute as texts; none where it is absent or damaged."""
    try:
        value = dataset.get(keyword)
    except Exception:  # pydicom promises no exception type for damaged values
        return ()
    if value is None:
        return ()
    values = [value] if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__") else value
    return tuple(str(item).strip() for item in values)


def _text(dataset: Any, keyword: str) -> str:
    return " ".join(_texts(dataset, keyword)).strip()


def _number(dataset: Any, keyword: str) -> float | None:
    """Return the first value of an attribute as a number; None where there is none."""
    try:
        return float(_texts(dataset, keyword)[0])
    except (IndexError, ValueError):
        return None
