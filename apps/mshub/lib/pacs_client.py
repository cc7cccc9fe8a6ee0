"""What this server asks a PACS over DICOMweb: which series there are, their files, and to keep a new object.

Every question has a time limit, and none is asked again by itself: a PACS that is down is a sentence within seconds.
While it is down, the questions of the next `QUIET_S` seconds (or of as many as the failure took to show) get the same
sentence at once; then it is tried again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from dicomweb_client.session_utils import create_session_from_user_pass
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMwebClientX
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ProtocolError

from mshub.errors import MSHubError

logger = logging.getLogger(__name__)

CONNECT_S, READ_S = 3.0, 30.0
"""How long a connection may take to open, and how long it may be silent while pixels come."""
ANSWER_S = 10.0
"""How long a PACS may think about a question that is not for pixels."""
QUIET_S = 2.0
PAGE = 500
AS_STORED = (("application/dicom", "*"),)
"""Any transfer syntax: a PACS that cannot decompress need not."""
FIELDS = (
    *("PatientID", "PatientName", "StudyDate", "StudyTime", "StudyDescription", "SeriesDescription"),
    *("NumberOfSeriesRelatedInstances", "SeriesNumber", "SeriesDate", "SeriesTime"),
)


class PacsError(MSHubError):
    """The PACS refused, or answered what cannot be used."""

    code = "pacs"
    http_status = 502


class PacsUnreachable(PacsError):
    """The PACS does not answer."""

    code = "pacs-unreachable"
    http_status = 503


class PacsClient:
    """A DICOMweb server, asked with time limits.

    Parameters
    ----------
    url : str
        Its root, such as ``http://pacs:8042/dicom-web``.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._client = DICOMwebClientX(
            url=self.url,
            session=_session(),
            qido_url_prefix=settings.MONAI_LABEL_QIDO_PREFIX or None,
            wado_url_prefix=settings.MONAI_LABEL_WADO_PREFIX or None,
            stow_url_prefix=settings.MONAI_LABEL_STOW_PREFIX or None,
        )
        self._client.set_http_retry_params(retry=False)
        self._lock = threading.Lock()
        self._problem, self._quiet_until = "", 0.0

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
            with self._asking("list its series"):
                page = self._client.search_for_series(
                    study_instance_uid=study, search_filters=search, fields=FIELDS, limit=PAGE, offset=len(found)
                )
                listed = {_identity(item): item for item in map(_dataset, page)}
            new = {identity: item for identity, item in listed.items() if all(identity) and identity not in found}
            found |= new
            if len(page) < PAGE or not new:  # a PACS that pays no heed to offset sends the same page again
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

    def files(self, study: str, series: str) -> Iterator[Dataset]:
        """Yield the instances of a series, as they are stored; errors as `series`."""
        with self._asking("send a series"):
            yield from self._client.iter_series(study, series, media_types=AS_STORED)

    def instance(self, study: str, series: str, instance: str) -> Dataset:
        """Return one instance with its pixels, as it is stored; errors as `series`."""
        with self._asking("send an object"):
            found: Dataset = self._client.retrieve_instance(study, series, instance, media_types=AS_STORED)
            return found

    def store(self, dataset: Dataset) -> None:
        """Store an object.

        Raises
        ------
        PacsError
            It does not answer, or does not take the object.
        """
        with self._asking("store an object"):
            answer = self._client.store_instances([dataset])
        failed = answer.get("FailedSOPSequence") or []
        if failed:
            reason = failed[0].get("FailureReason", "no reason given")
            raise PacsError(f"The PACS did not store the object (FailureReason {reason}); see the log of the PACS.")

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        with self._lock:
            if started < self._quiet_until:
                raise PacsUnreachable(self._problem)
        try:
            yield
        except (requests.ConnectionError, requests.Timeout) as error:
            self._problem = (
                f"The PACS at {self.url} does not answer ({_reason(error)}). Expected: a DICOMweb server. How to fix: "
                "start it, or correct the address; it is tried again by itself."
            )
            with self._lock:
                now = time.monotonic()
                self._quiet_until = now + max(QUIET_S, now - started)
            raise PacsUnreachable(self._problem) from error
        except requests.HTTPError as error:
            self._problem = ""
            raise PacsError(self._refusal(what, error)) from error
        except (ValueError, KeyError, TypeError, AttributeError, InvalidDicomError, requests.RequestException) as error:
            raise PacsError(
                f"The PACS at {self.url} was asked to {what} and sent no DICOMweb answer ({error}). How to fix: "
                "check that the address ends with the root of its DICOMweb service."
            ) from error
        else:
            self._problem = ""

    def _refusal(self, what: str, error: requests.HTTPError) -> str:
        status = error.response.status_code if error.response is not None else "no status"
        if status in (401, 403):
            return (
                f"The PACS at {self.url} refused this server's credentials (HTTP {status}). How to fix: set "
                "MONAI_LABEL_DICOMWEB_USERNAME and MONAI_LABEL_DICOMWEB_PASSWORD."
            )
        return (
            f"The PACS at {self.url} was asked to {what} and answered HTTP {status}. How to fix: see the log of the "
            "PACS, or check that the address ends with the root of its DICOMweb service."
        )


class _TimeLimits(HTTPAdapter):
    """Requests that name no time limit get ours.

    A question sent on a connection that the PACS was just closing, because nothing was said on it for a while, is asked
    again at once.
    """

    def send(self, request: Any, **options: Any) -> requests.Response:  # type: ignore[override]
        told = "json" in (request.headers.get("Accept") or "")
        options["timeout"] = options.get("timeout") or (CONNECT_S, ANSWER_S if told else READ_S)
        try:
            return super().send(request, **options)
        except requests.ConnectionError as error:
            if request.method != "GET" or not isinstance(next(iter(error.args), None), ProtocolError):
                raise
            return super().send(request, **options)


def credentials() -> tuple[str, str] | None:
    """Return user name and password for the PACS, if this server has been given them."""
    user, password = settings.MONAI_LABEL_DICOMWEB_USERNAME, settings.MONAI_LABEL_DICOMWEB_PASSWORD
    return (user, password) if user and password else None


def download(
    client: PacsClient,
    study: str,
    series: str,
    folder: Path,
    expected: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the files of a series to `folder`, which does not exist yet.

    Raises
    ------
    PacsError
        The PACS does not answer, or sends fewer instances than it lists (`expected`; 0 if it does not say).
    """
    folder.mkdir(parents=True)
    uids: set[str] = set()
    for number, dataset in enumerate(client.files(study, series), 1):
        uids.add(str(dataset.SOPInstanceUID))
        dataset.save_as(str(_file_of(dataset, folder, number)), write_like_original=False)
        progress(number, expected)
    if len(uids) < expected:
        raise PacsError(
            f"The PACS lists {expected} instances of the series {series} and sent {len(uids)}. Expected: all of them. "
            "How to fix: try again; if it stays so, look for damaged instances in the PACS."
        )


def _identity(item: Dataset) -> tuple[str, str]:
    return str(item.get("StudyInstanceUID") or ""), str(item.get("SeriesInstanceUID") or "")


def _dataset(item: dict[str, Any]) -> Dataset:
    """Return DICOM JSON as a data set; what it only gives the address of, such as pixels, is left out."""
    return Dataset.from_json(item, bulk_data_uri_handler=lambda *_: None)


def _file_of(dataset: Dataset, folder: Path, number: int) -> Path:
    """Return the file to write an instance to, by the number people know it by: messages name it."""
    name = f"image {dataset.get('InstanceNumber')}"
    path = folder / name
    return path if name.removeprefix("image ").isdecimal() and not path.exists() else folder / f"file {number}"


def _session() -> requests.Session:
    known = credentials()
    session = create_session_from_user_pass(*known) if known else requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, _TimeLimits(pool_maxsize=16))
    return session


def _reason(error: Exception) -> str:
    return "it took too long" if isinstance(error, requests.Timeout) else "no connection"


def text_of(dataset: Dataset, keywords: Sequence[str]) -> dict[str, str]:
    """Return the attributes that have a value, as text."""
    return {key: str(dataset.get(key)) for key in keywords if dataset.get(key) not in (None, "")}
