"""Everything MSHub can refuse, as one tree.

::

    MSHubError
    |-- ConfigError            an option that does not exist or has an impossible value
    |-- AccessError            a user, password or token that cannot be made, changed or found
    |-- CatalogueError         a model card that cannot be read, or no such model id
    |-- StoreError             the model store refused
    |   |-- ChecksumMismatch   bytes differ from the recorded sha256
    |   |-- ModelNotAvailable  the model is known but not installed here
    |   `-- DownloadError      the weights could not be fetched
    |-- ModelFolderError       a folder that is no usable nnU-Net model
    |   `-- UnsafeModelError   opening one of its files would run somebody's code
    |-- CaseError              an image that cannot be segmented
    |   |-- GeometryError      its grid is degenerate, or two grids differ
    |   `-- ChannelError       the wrong number or kind of channels
    |-- StorageFull            the disk has no room for what is to be stored
    |-- LabelError             label names or values that do not fit the model
    |-- PredictionError        the network ran and failed
    |   |-- Interrupted        it was ended to let somebody else go first, or nobody waits for it any more
    |   |-- DeviceFull         a device has too little memory for it
    |   `-- Busy               too many others wait for the device already
    `-- TrainingError          a training could not start or did not finish
        `-- LabelsChanged      labels it was to learn from became others just then

Every message says what was found, what was expected, and how to fix it. `code` is a stable, machine-readable name;
`http_status` is what a server should answer.
"""

from __future__ import annotations

LONGEST_MESSAGE = 4000  # strangers' files are quoted: none of them may fill a screen, or command a terminal


class MSHubError(Exception):
    """Base of all errors raised on purpose by MSHub."""

    code: str = "error"
    http_status: int = 400

    def __init__(self, message: str = "") -> None:
        super().__init__(legible(message))


def legible(text: str) -> str:
    """Return a text as it may be printed: control characters are spelled out, and it has an end."""
    shown = "".join(
        sign if sign.isprintable() or sign == "\n" else ascii(sign)[1:-1] for sign in text[:LONGEST_MESSAGE]
    )
    return shown + (f"... ({len(text):,} characters)" if len(text) > LONGEST_MESSAGE else "")


class ConfigError(MSHubError):
    code = "config"


class AccessError(MSHubError):
    code = "access"


class CatalogueError(MSHubError):
    code = "catalogue"
    http_status = 404


class StoreError(MSHubError):
    code = "store"


class ChecksumMismatch(StoreError):
    code = "checksum"


class ModelNotAvailable(StoreError):
    code = "model-not-available"
    http_status = 404


class DownloadError(StoreError):
    code = "download"


class ModelFolderError(MSHubError):
    code = "model-folder"


class UnsafeModelError(ModelFolderError):
    code = "unsafe-model"


class CaseError(MSHubError):
    code = "case"
    http_status = 422


class GeometryError(CaseError):
    code = "geometry"


class ChannelError(CaseError):
    code = "channels"


class StorageFull(MSHubError):
    code = "storage-full"
    http_status = 507


class LabelError(MSHubError):
    code = "label"
    http_status = 422


class PredictionError(MSHubError):
    code = "prediction"
    http_status = 422


class Interrupted(PredictionError):
    code = "interrupted"
    http_status = 503


class DeviceFull(PredictionError):
    code = "device-full"


class Busy(PredictionError):
    """Too many others wait already; `retry_after_s` is when it may be better."""

    code = "busy"
    http_status = 503

    def __init__(self, message: str, retry_after_s: float = 10.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TrainingError(MSHubError):
    code = "training"


class LabelsChanged(TrainingError):
    code = "labels-changed"
    http_status = 409
