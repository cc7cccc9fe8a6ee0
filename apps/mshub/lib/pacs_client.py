"""What this server asks a PACS over DICOMweb: which series there are, their files, and to keep a new object.

Every question has a time limit: a PACS that is down is a sentence within seconds. Only one that says it has no time is
asked again, twice and after a pause.
While it is down, the questions of the next `QUIET_S` seconds (or of as many as the failure took to show) get the same
sentence at once; then it is tried again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from monailabel.config import settings
from monailabel.datastore.dicom import DICOMwebClientX
from pydicom.dataset import Dataset

from lib.pacs_errors import PacsError, PacsUnreachable, is_busy, is_silence, pacs_error
from lib.pacs_session import READ_S, pacs_session
from mshub.errors import MSHubError

logger = logging.getLogger(__name__)

LIST = "list its series"
QUIET_S = 2.0
PAGE, LEAST_PAGE = 500, 50
"""How many series are asked for at a time; some PACS give fewer, and none so few that there are more."""
AS_STORED = (("application/dicom", "*"),)
"""Any transfer syntax: a PACS that cannot decompress need not."""
COUNT_TAG = "00201209"  # NumberOfSeriesRelatedInstances
FIELDS = (
    *("PatientID", "PatientName", "StudyDate", "StudyTime", "StudyDescription", "SeriesDescription"),
    *("NumberOfSeriesRelatedInstances", "SeriesNumber", "SeriesDate", "SeriesTime"),
)


class PacsClient:
    """A DICOMweb server, asked with time limits.

    Parameters
    ----------
    url : str
        Its root, such as ``http://pacs:8042/dicom-web``.
    silence_s : float
        How long it may send nothing while pixels come; it has less time for other answers.
    """

    def __init__(self, url: str, silence_s: float = READ_S) -> None:
        self.url = url.rstrip("/")
        self._client = DICOMwebClientX(
            url=self.url,
            session=pacs_session(silence_s),
            qido_url_prefix=settings.MONAI_LABEL_QIDO_PREFIX or None,
            wado_url_prefix=settings.MONAI_LABEL_WADO_PREFIX or None,
            stow_url_prefix=settings.MONAI_LABEL_STOW_PREFIX or None,
        )
        self._client.set_http_retry_params(retry=False)
        self._lock = threading.Lock()
        self._problem, self._quiet_until = "", 0.0
        self._trouble: PacsError | None = None

    @property
    def problem(self) -> str:
        """Why the PACS did not answer when it was last asked; empty if it did."""
        return self._problem

    def series(self, **search: str) -> list[Dataset]:
        """Return what the PACS lists of the series that match, such as ``Modality="CT"``, one data set each.

        Raises
        ------
        PacsError
            It does not answer, or refuses.
        """
        found: dict[tuple[str, str], Dataset] = {}
        study = search.pop("StudyInstanceUID", None)
        while True:
            with self._asking(LIST):
                page = self._client.search_for_series(
                    study_instance_uid=study, search_filters=search, fields=FIELDS, limit=PAGE, offset=len(found)
                )
                listed = {_identity(item): item for item in map(_series, page)}
            new = {identity: item for identity, item in listed.items() if all(identity) and identity not in found}
            found |= new
            if len(page) < LEAST_PAGE or not new:  # a PACS that pays no heed to offset sends the same page again
                return list(found.values())

    def instances(self, study: str, series: str) -> list[Dataset]:
        """Return all attributes of a series' instances but their bulk data; errors as `series`."""
        with self._asking("describe a series"):
            return [_dataset(item) for item in self._client.retrieve_series_metadata(study, series)]

    def any_instance(self, study: str, series: str) -> Dataset:
        """Return the attributes of one instance of a series; errors as `series`."""
        with self._asking("describe a series"):
            listed = self._client.search_for_instances(study, series, limit=1)
            if not listed:
                raise PacsError(f"The PACS lists no instance of the series {series}; look at it in the PACS.")
            uid = str(_dataset(listed[0])["SOPInstanceUID"].value)
            return _dataset(self._client.retrieve_instance_metadata(study, series, uid))

    def instance_classes(self, study: str, series: str) -> dict[str, str]:
        """Return the instances it lists of a series: SOPInstanceUID -> SOPClassUID; errors as `series`."""
        found: dict[str, str] = {}
        while True:
            with self._asking("list a series"):
                page = self._client.search_for_instances(study, series, limit=PAGE, offset=len(found))
                listed = {str(item.SOPInstanceUID): str(item.get("SOPClassUID") or "") for item in map(_dataset, page)}
            if listed.keys() <= found.keys():  # the end, however many the PACS gives at a time
                return found
            found |= listed

    def files(self, study: str, series: str) -> Iterator[Dataset]:
        """Yield the instances of a series, as they are stored; errors as `series`."""
        with self._asking("send a series", pixels=True):
            yield from self._client.iter_series(study, series, media_types=AS_STORED)

    def instance(self, study: str, series: str, instance: str) -> Dataset:
        """Return one instance with its pixels, as it is stored; errors as `series`."""
        with self._asking("send an object", pixels=True):
            found: Dataset = self._client.retrieve_instance(study, series, instance, media_types=AS_STORED)
            return found

    def store(self, dataset: Dataset) -> None:
        """Store an object.

        Raises
        ------
        PacsError
            It does not answer, or does not take the object: only what it says, or lists, counts.
        """
        with self._asking("store an object"):
            answer = self._client.store_instances([dataset])
        failed = answer.get("FailedSOPSequence") or []
        if failed:
            reason = failed[0].get("FailureReason", "no reason given")
            raise PacsError(f"The PACS did not store the object (FailureReason {reason}); see the log of the PACS.")
        uid = str(dataset.SOPInstanceUID)
        if uid not in _stored(answer) and not self.lists(dataset.StudyInstanceUID, dataset.SeriesInstanceUID, uid):
            raise PacsError("The PACS took the object, and does not list it; see the log of the PACS.")

    def lists(self, study: str, series: str, instance: str) -> bool:
        """Return whether it lists an instance; errors as `series`."""
        with self._asking("list an object"):
            named = {"SOPInstanceUID": instance}
            found = self._client.search_for_instances(study, series, search_filters=named, limit=1)
            return any(str(_dataset(item).get("SOPInstanceUID")) == instance for item in found)

    @contextmanager
    def _asking(self, what: str, *, pixels: bool = False) -> Iterator[None]:
        """Translate what goes wrong; a PACS that is not there, or has no time to list its series, is left alone.

        One that stops in the middle of `pixels` is not: the series may be on a slow archive, and others are not.
        """
        started = time.monotonic()
        with self._lock:
            if self._trouble and started < self._quiet_until:
                raise type(self._trouble)(str(self._trouble))
        try:
            yield
        except MSHubError:
            raise
        except Exception as error:  # neither pydicom nor the client's library promises types for what is no answer
            trouble = pacs_error(self.url, what, error)
            away = isinstance(trouble, PacsUnreachable) and not (pixels and is_silence(error))
            if away or (what == LIST and is_busy(error)):
                self._leave_alone(trouble, started)
            else:
                self._problem = ""
            raise trouble from error
        else:
            self._problem = ""

    def _leave_alone(self, trouble: PacsError, started: float) -> None:
        with self._lock:
            now = time.monotonic()
            self._trouble, self._problem = trouble, str(trouble)
            self._quiet_until = now + max(QUIET_S, now - started)


def _stored(answer: Dataset) -> set[str]:
    """Return the objects an answer to storing says are stored."""
    return {str(item.get("ReferencedSOPInstanceUID")) for item in answer.get("ReferencedSOPSequence") or []}


def _identity(item: Dataset) -> tuple[str, str]:
    return str(item.get("StudyInstanceUID") or ""), str(item.get("SeriesInstanceUID") or "")


def _series(item: dict[str, Any]) -> Dataset:
    """Return what is listed of a series; without its number of instances where that is no number.

    An attribute that nobody can read, such as a SeriesNumber ``1.5``, is left out, and the series and others are not.
    """
    count = (item.get(COUNT_TAG) or {}).get("Value") or [""]
    usable = item if str(count[0]).isdecimal() else {tag: value for tag, value in item.items() if tag != COUNT_TAG}
    try:
        return _dataset(usable)
    except Exception:  # pydicom promises no types
        found = Dataset()
        for tag, value in usable.items():
            with suppress(Exception):
                found.update(_dataset({tag: value}))
        return found


def _dataset(item: dict[str, Any]) -> Dataset:
    """Return DICOM JSON as a data set; what it only gives the address of, such as pixels, is left out."""
    return Dataset.from_json(item, bulk_data_uri_handler=lambda *_: None)


def text_of(dataset: Dataset, keywords: Sequence[str]) -> dict[str, str]:
    """Return the attributes that have a value, as text."""
    return {key: str(dataset.get(key)) for key in keywords if dataset.get(key) not in (None, "")}
