"""A server that is stopped leaves an index that says all, for programs that know nothing of its journal."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from monailabel.datastore.local import LocalDatastore

from arena import CASES, Arena
from factories import make_image


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stock_monai_label_finds_in_the_index_what_was_stored(tmp_path: Path, how: signal.Signals) -> None:
    place = Arena(tmp_path)
    journal = place.studies / "datastore_v2.journal"
    try:
        upload = make_image(tmp_path / "upload.nii.gz", (9, 8, 7), seed=5)
        place.server.client(tmp_path).upload_image(str(upload), "new", {"from": "scanner"})
        assert journal.exists()
        place.process.send_signal(how)
        place.process.wait(60)
    finally:
        place.server.stop()
    assert not journal.exists()
    stock = LocalDatastore(str(place.studies), extensions=["*.nii.gz"])
    assert stock.get_image_info("new")["from"] == "scanner"
    assert set(stock.list_images()) == {*CASES, "new"}
