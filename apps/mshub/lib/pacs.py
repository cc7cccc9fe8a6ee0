"""Series of a DICOMweb server: whole or not at all, under ids that are DICOM UIDs."""

from __future__ import annotations

import logging
import re
import shutil
import threading
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMwebClientX, DICOMWebDatastore
from monailabel.datastore.utils.dicom import dicom_web_download_series

from lib.faults import as_http_errors, check_name
from mshub.dicom_series import read_series_grid

logger = logging.getLogger(__name__)

_UID = re.compile(r"\d+(\.\d+)*")
MAX_UID_LENGTH = 64


def open_pacs(url: str) -> PacsSeries:
    """Return the series behind a DICOMweb address, with MONAI Label's settings for credentials and prefixes."""
    session = None
    if settings.MONAI_LABEL_DICOMWEB_USERNAME and settings.MONAI_LABEL_DICOMWEB_PASSWORD:
        from dicomweb_client.session_utils import create_session_from_user_pass

        session = create_session_from_user_pass(
            settings.MONAI_LABEL_DICOMWEB_USERNAME, settings.MONAI_LABEL_DICOMWEB_PASSWORD
        )
    client = DICOMwebClientX(
        url=url,
        session=session,
        qido_url_prefix=settings.MONAI_LABEL_QIDO_PREFIX,
        wado_url_prefix=settings.MONAI_LABEL_WADO_PREFIX,
        stow_url_prefix=settings.MONAI_LABEL_STOW_PREFIX,
    )
    if shutil.which("itkimage2segimage") is None:
        logger.warning("dcmqi's itkimage2segimage is not installed: labels cannot be stored as DICOM SEG")
    return PacsSeries(
        client=client,
        search_filter=settings.MONAI_LABEL_DICOMWEB_SEARCH_FILTER,
        cache_path=settings.MONAI_LABEL_DICOMWEB_CACHE_PATH.strip() or None,
        fetch_by_frame=settings.MONAI_LABEL_DICOMWEB_FETCH_BY_FRAME,
        convert_to_nifti=settings.MONAI_LABEL_DICOMWEB_CONVERT_TO_NIFTI,
    )


class PacsSeries(DICOMWebDatastore):  # type: ignore[misc]
    """MONAI Label's DICOMweb datastore, made safe for requests that come at the same time.

    MONAI Label takes any folder in its cache that is not empty for a complete series; here a series appears in the
    cache by one rename, after it was downloaded and found to be one regular stack of slices.
    """

    def __init__(self, **options: Any) -> None:
        self._downloading = threading.Lock()
        super().__init__(**options)

    def get_image_uri(self, image_id: str) -> str:
        """Return the path of a series as NIfTI, downloading it first if needed.

        Raises
        ------
        HTTPException
            404 for an id that is no UID or that the PACS does not have; 4xx for a series that is no regular volume.
        """
        if len(image_id) > MAX_UID_LENGTH or not _UID.fullmatch(image_id):
            raise HTTPException(404, f"There is no series {image_id[:80]!r}: expected a SeriesInstanceUID.")
        with self._downloading:
            try:
                self._fetch_whole(image_id)
                return self._kept(image_id, Path(super().get_image_uri(image_id)))
            except (IndexError, KeyError) as error:  # what MONAI Label makes of an empty answer of the PACS
                raise HTTPException(404, f"The PACS has no series {image_id!r}.") from error

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Refuse an upload: images come to this server through the PACS."""
        raise HTTPException(405, "This server shows a PACS: store the image there, it appears here by itself.")

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any], label_id: str = ""
    ) -> str:
        """Store a label under a checked tag; a final one goes to the PACS as DICOM SEG."""
        check_name("label tag", label_tag)
        stored: str = super().save_label(image_id, label_filename, label_tag, label_info, label_id)
        return stored

    def _kept(self, image_id: str, path: Path) -> str:
        """Return the file in the cache; MONAI Label returns the temporary one it was copied from, and leaves it."""
        kept = Path(self._datastore.image_path()).resolve() / f"{image_id}.nii.gz"
        if path != kept and kept.is_file() and path.is_file():
            path.unlink()
            return str(kept)
        return str(path)

    def _fetch_whole(self, image_id: str) -> None:
        folder = Path(self._datastore.image_path()) / image_id
        if folder.is_dir():
            return
        pending = folder.with_name(f".{image_id}.part")
        shutil.rmtree(pending, ignore_errors=True)
        dicom_web_download_series(None, image_id, str(pending), self._client, self._fetch_by_frame)
        with as_http_errors():
            try:
                read_series_grid(pending)
            except BaseException:
                shutil.rmtree(pending, ignore_errors=True)
                raise
        pending.replace(folder)
