"""What storing costs with many images: a label, a note of an image, an upload, beside an index of so many.

    python bench/reliability/index_cost.py           # 200, 2,000 and 10,000 images; some minutes
    python bench/reliability/index_cost.py --quick   # 50 and 500 images

Three datastores side by side on folders of their own that hold the same: MONAI Label's own; MSHub's as it was, which
wrote the whole index and a copy of it each time; MSHub's. Every image has a pre-label and a final label of 15
structures, with what the server notes of such. The images are tiny: what they cost themselves is not looked at here.

A save of MSHub's is given with its share of writing the index whole, which it has paid for when the journal is as long
as the index. Figures: bench/out/reliability/index_cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import nibabel as nib
import numpy as np
from monailabel.datastore.local import LocalDatastore

from arena import keep, make_image, table
from lib.datastore import StudiesFolder
from lib.index_file import INDEX, back_up_last
from mshub.atomic_file import replace_json

SHAPE = (12, 11, 10)
IMAGES, QUICK = (200, 2_000, 10_000), (50, 500)
STRUCTURES = tuple(f"structure_number_{number}" for number in range(15))
TIMES = 20
SLOW_ENTRIES = 2_000
"""Of the others, as many saves as take about as long as one with so many images."""
WHAT = ("label", "note", "upload")


class Before(StudiesFolder):
    """The datastore as it was: every change writes the index whole, a label also its copy, an upload looks at all."""

    def _store(self, entries: Any, absent: Any = None) -> None:
        self._apply(entries, absent or {})
        replace_json(self._journal.index, self._datastore.model_dump(exclude={"base_path"}))
        self._journal.read_index()

    def _store_label(self, *given: Any) -> str:
        stored = super()._store_label(*given)
        back_up_last(self._journal.index)
        return stored

    def _take_in_image(self, *given: Any) -> str:
        LocalDatastore._reconcile_datastore(self)
        return super()._take_in_image(*given)


def info_of_prelabel() -> dict[str, Any]:
    """Return what the server notes of a pre-label."""
    names = {name: number for number, name in enumerate(STRUCTURES, 1)}
    counts = dict.fromkeys(STRUCTURES, 12345)
    agreement = dict.fromkeys(STRUCTURES, 0.91234)
    params = {
        "label_names": names,
        "voxel_counts": counts,
        "model_version": "v3",
        "model": "tiny",
        "uncertainty": {"agreement": agreement, "entropy": agreement, "score": 0.123},
        "provenance": {"folds": [0, 1, 2, 3, 4], "profile": "balanced", "device": "cuda", "seconds": 12.3},
    }
    return {"model": "tiny", "params": params, "ts": 1795711426}


def info_of_label() -> dict[str, Any]:
    """Return what the server notes of a final label."""
    volumes = dict.fromkeys(STRUCTURES, 123.4567)
    agreement = {"dice": dict.fromkeys(STRUCTURES, 0.91234), "edited_voxels": dict.fromkeys(STRUCTURES, 321)}
    return {
        "label_info": segments(),
        "reviewed": list(STRUCTURES),
        "voxels": dict.fromkeys(STRUCTURES, 12345),
        "volumes_ml": volumes,
        "agreement": agreement,
        "started_from": {"model": "tiny", "version": "v3"},
        "submitted": "2026-11-26T10:00:00+00:00",
        "client_id": "ada",
        "hints": [],
        "doubts": [],
    }


def segments() -> list[dict[str, Any]]:
    """Return the names of a label's segments, as clients send them."""
    return [{"name": name, "idx": number} for number, name in enumerate(STRUCTURES, 1)]


def make_folder(folder: Path, images: int) -> None:
    """Make a folder of so many images and labels, links to three files, and its index."""
    image, label = make_image(folder.parent / "image.nii.gz", SHAPE), folder.parent / "stored.nii.gz"
    shutil.copyfile(make_label(folder.parent), label)
    objects = {}
    for tag in ("final", "original"):
        (folder / "labels" / tag).mkdir(parents=True)
    for number in range(images):
        name = f"case{number:05d}"
        os.link(image, folder / f"{name}.nii.gz")
        labels = {"original": info_of_prelabel(), "final": info_of_label()}
        for tag in labels:
            os.link(label, folder / "labels" / tag / f"{name}.nii.gz")
        objects[name] = {
            "image": {"ext": ".nii.gz", "info": {"ts": 1795711426, "name": f"{name}.nii.gz"}},
            "labels": {tag: {"ext": ".nii.gz", "info": info} for tag, info in labels.items()},
        }
    head = {"name": "bench", "description": "", "images_dir": ".", "labels_dir": "labels"}
    (folder / INDEX).write_text(json.dumps({**head, "objects": objects}))


def make_label(folder: Path) -> Path:
    """Write a label with all the structures on the grid of the images."""
    image = nib.load(folder / "image.nii.gz")
    array = (np.arange(np.prod(SHAPE)).reshape(SHAPE) // 3 % (len(STRUCTURES) + 1)).astype(np.uint8)
    path = folder / "submitted.nii.gz"
    nib.save(nib.Nifti1Image(array, image.affine), path)
    return path


def opened(kind: str, folder: Path) -> LocalDatastore:
    """Open a folder with one of the datastores."""
    if kind == "MONAI Label":
        return LocalDatastore(str(folder), extensions=["*.nii.gz"])
    make = StudiesFolder if kind == "MSHub" else Before
    return make(str(folder), lambda: STRUCTURES, folder.parent / "refused")


def ask(store: LocalDatastore, what: str, number: int, scratch: Path) -> None:
    """Let a datastore store something once."""
    case = f"case{number:05d}"
    if what == "label":
        store.save_label(case, str(scratch / "submitted.nii.gz"), "final", {"label_info": segments()})
    elif what == "note":
        store.update_image_info(case, {"strategy": {"first": {"ts": number, "client_id": "ada"}}})
    else:
        store.add_image(f"new{number}", str(scratch / "image.nii.gz"), {"from": "scanner"})


def seconds(do: Callable[[], object]) -> tuple[float, float]:
    """Return how long something takes, and how much of it is computing, whatever else the machine does."""
    started, computed = time.perf_counter(), time.process_time()
    do()
    return time.perf_counter() - started, time.process_time() - computed


def measured(kind: str, images: int, folder: Path) -> dict[str, Any]:
    """Return milliseconds of what a datastore stores beside so many images, and of opening them."""
    studies = folder / "studies"
    studies.mkdir(parents=True)
    make_folder(studies, images)
    stores: list[LocalDatastore] = []
    figures: dict[str, Any] = {"kind": kind, "images": images}
    figures["open_ms"] = 1000 * seconds(lambda: stores.append(opened(kind, studies)))[0]
    (store,), journal = stores, studies / "datastore_v2.journal"
    for what in WHAT:
        before = journal.stat().st_size if journal.exists() else 0
        count = TIMES if kind == "MSHub" else max(1, min(TIMES, SLOW_ENTRIES // images))
        times = [seconds(partial(ask, store, what, number, folder)) for number in range(count)]
        figures[f"{what}_ms"] = 1000 * median(took for took, _ in times)
        figures[f"{what}_cpu_ms"] = 1000 * median(computed for _, computed in times)
        figures[f"{what}_most_ms"] = 1000 * max(took for took, _ in times)
        if kind == "MSHub":
            figures[f"{what}_bytes"] = (journal.stat().st_size - before) / len(times)
    figures["index_bytes"] = (studies / INDEX).stat().st_size
    if kind == "MSHub":
        figures["whole_ms"], figures["whole_cpu_ms"] = (1000 * took for took in seconds(store.close))
        for what in WHAT:
            share = figures[f"{what}_bytes"] / max(figures["index_bytes"], 2**20)
            figures[f"{what}_ms"] += share * figures["whole_ms"]
            figures[f"{what}_cpu_ms"] += share * figures["whole_cpu_ms"]
    return figures


def report(found: list[dict[str, Any]]) -> str:
    """Return the figures as a table."""
    rows = [
        (
            f"{one['images']:,}",
            f"{one['index_bytes'] / 1e6:.1f} MB",
            one["kind"],
            *(f"{one[f'{what}_ms']:,.1f} ({one[f'{what}_cpu_ms']:,.1f})" for what in WHAT),
            f"{one['open_ms']:,.0f}",
        )
        for one in found
    ]
    head = ("images", "index", "datastore", "ms a label (computing)", "ms a note", "ms an upload", "ms to open")
    return table(head, rows)


def holds(found: list[dict[str, Any]]) -> bool:
    """Return whether storing does not cost more with many images: nothing computes twice as long as with the fewest."""
    ours = [one for one in found if one["kind"] == "MSHub"]
    return all(ours[-1][f"{what}_cpu_ms"] < 2 * ours[0][f"{what}_cpu_ms"] + 2 for what in WHAT)


def main() -> None:
    """Measure, and end with 1 if a save costs more with many images."""
    parser = argparse.ArgumentParser(description=re.split(r"\n\n", str(__doc__))[0])
    parser.add_argument("--quick", action="store_true", help="50 and 500 images")
    options, found = parser.parse_args(), list[dict[str, Any]]()
    for images in QUICK if options.quick else IMAGES:
        for kind in ("MSHub", "MONAI Label", "MSHub, whole each time"):
            with tempfile.TemporaryDirectory(prefix="mshub-bench-") as name:
                found.append(measured(kind, images, Path(name)))
            print(f"measured: {images:,} images, {kind}", file=sys.stderr, flush=True)
            keep("index_cost_so_far", {"found": found})
    path = keep("index_cost_quick" if options.quick else "index_cost", {"found": found})
    print(report(found))
    print(f"figures: {path}")
    sys.exit(0 if holds(found) else 1)


if __name__ == "__main__":
    main()
