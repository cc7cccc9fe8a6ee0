"""A PACS in memory, as `lib.pacs_client.PacsClient` shows it: to be down, slow or wrong at will."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

from pydicom.dataset import Dataset

from lib.pacs_errors import PacsError, PacsUnreachable


class FakePacs:
    """What stands in for a `PacsClient`.

    Attributes
    ----------
    objects : list of Dataset
        All instances.
    down : bool
        It does not answer.
    lost : set of int
        Positions of instances that it lists and does not send.
    downloads : list of str
        Series it was asked to send.
    refuses_objects, hangs_up : bool
        What is stored is refused; is kept, and not answered.
    counts : bool
        It says how many instances a series has.
    """

    url = "http://127.0.0.1:1/dicom-web"
    problem = ""

    def __init__(self, *series: Sequence[Dataset]) -> None:
        self.objects = [instance for one in series for instance in one]
        self.down, self.lost, self.downloads = False, set[int](), list[str]()
        self.questions, self.refuses_objects, self.hangs_up, self.counts = 0, False, False, True
        self._lock = threading.Lock()

    def _asked(self) -> None:
        with self._lock:
            self.questions += 1
        if self.down:
            raise PacsUnreachable("The PACS does not answer.")

    def _of(self, study: str, series: str) -> list[Dataset]:
        return [item for item in self.objects if (item.StudyInstanceUID, item.SeriesInstanceUID) == (study, series)]

    def series(self, **search: str) -> list[Dataset]:
        self._asked()
        found: dict[tuple[str, str], Dataset] = {}
        for item in self.objects:
            if all(str(item.get(key)) == value for key, value in search.items()):
                identity = (str(item.StudyInstanceUID), str(item.SeriesInstanceUID))
                listed = found.setdefault(identity, Dataset())
                for key in ("StudyInstanceUID", "SeriesInstanceUID", "Modality", "PatientID", "SeriesDescription"):
                    setattr(listed, key, item.get(key))
                if self.counts:
                    listed.NumberOfSeriesRelatedInstances = int(listed.get("NumberOfSeriesRelatedInstances") or 0) + 1
        return list(found.values())

    def instances(self, study: str, series: str) -> list[Dataset]:
        self._asked()
        return self._of(study, series)

    def instance_classes(self, study: str, series: str) -> dict[str, str]:
        self._asked()
        return {str(item.SOPInstanceUID): str(item.SOPClassUID) for item in self._of(study, series)}

    def lists(self, study: str, series: str, instance: str) -> bool:
        return instance in self.instance_classes(study, series)

    def any_instance(self, study: str, series: str) -> Dataset:
        self._asked()
        return self._of(study, series)[0]

    def files(self, study: str, series: str) -> Iterator[Dataset]:
        self._asked()
        self.downloads.append(series)
        for number, item in enumerate(self._of(study, series)):
            if number not in self.lost:
                time.sleep(0.001)
                yield item

    def instance(self, study: str, series: str, instance: str) -> Dataset:
        self._asked()
        return next(item for item in self._of(study, series) if instance == item.SOPInstanceUID)

    def store(self, dataset: Dataset) -> None:
        self._asked()
        if self.refuses_objects:
            raise PacsError("The PACS did not store the object (FailureReason 272).")
        self.objects.append(dataset)
        if self.hangs_up:
            raise PacsUnreachable("The PACS does not answer.")
