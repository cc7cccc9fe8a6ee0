"""What can go wrong with a PACS, in words."""

from __future__ import annotations

import requests
from requests.exceptions import ChunkedEncodingError
from urllib3.exceptions import ReadTimeoutError

from lib.pacs_session import BUSY
from mshub.errors import MSHubError


class PacsError(MSHubError):
    """The PACS refused, or answered what cannot be used."""

    code = "pacs"
    http_status = 502


class PacsUnreachable(PacsError):
    """The PACS does not answer."""

    code = "pacs-unreachable"
    http_status = 503


def pacs_error(url: str, what: str, error: Exception) -> PacsError:
    """Return what to say of an error that came of asking a PACS to do something, such as ``list its series``."""
    if isinstance(error, requests.HTTPError):
        return PacsError(_refusal(url, what, _status(error)))
    if isinstance(error, ChunkedEncodingError):
        return PacsError(
            f"The PACS at {url} was asked to {what} and hung up before the end. Expected: the whole answer. How to "
            "fix: try again; if it stays so, see the log of the PACS, and of what is between it and this server."
        )
    if isinstance(error, requests.ConnectionError | requests.Timeout):
        reason = "it took too long" if is_silence(error) else "no connection"
        return PacsUnreachable(
            f"The PACS at {url} does not answer ({reason}). Expected: a DICOMweb server. How to fix: "
            "start it, or correct the address; it is tried again by itself."
        )
    return PacsError(
        f"The PACS at {url} was asked to {what} and sent no DICOMweb answer ({error}). How to fix: "
        "check that the address ends with the root of its DICOMweb service."
    )


def is_silence(error: Exception) -> bool:
    """Return whether a PACS was there and said nothing for too long."""
    return isinstance(error, requests.ReadTimeout) or isinstance(next(iter(error.args), None), ReadTimeoutError)


def is_busy(error: Exception) -> bool:
    """Return whether a PACS said that it has no time, or has trouble of its own."""
    return isinstance(error, requests.HTTPError) and _status(error) in BUSY


def _status(error: requests.HTTPError) -> int:
    return error.response.status_code if error.response is not None else 0


def _refusal(url: str, what: str, status: int) -> str:
    if status in (401, 403):
        return (
            f"The PACS at {url} refused this server's credentials (HTTP {status}). How to fix: set "
            "MONAI_LABEL_DICOMWEB_USERNAME and MONAI_LABEL_DICOMWEB_PASSWORD."
        )
    return (
        f"The PACS at {url} was asked to {what} and answered HTTP {status}. How to fix: see the log of the "
        "PACS, or check that the address ends with the root of its DICOMweb service."
    )
