"""Files that mean harm, or are broken, sent to a real server: every one is refused, and nothing of it stays.

    python bench/reliability/bad_files.py              # all, with 1000 flipped bits; some minutes
    python bench/reliability/bad_files.py --quick      # a part of them
    python bench/reliability/bad_files.py --count 200  # so many flipped bits

Images go to all four places that take one (two uploads, a session, a prediction), series to a session, labels to an
image's label. What counts: every answer is a 4xx with a code and a sentence, the server takes less than 200 MB more
than before, and leaves no temporary file. Figures: bench/out/reliability/bad_files.json.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np

from arena import CASES, MIB, MODEL, Arena, arena, keep, table
from bad_dicom import bad_dicom, good_series
from bad_labels import BadLabel, bad_labels, good_label
from bad_nifti import bad_nifti, encoded, image, zipped

MOST_GROWTH = 200 * MIB
TIMEOUT_S = 300
NO_ANSWER = 599
QUICK = 6
"""Every so many files are sent with ``--quick``, and no bombs, which take seconds to make."""


@dataclass(frozen=True)
class Sent:
    """One request and what came of it.

    Attributes
    ----------
    kind, name, where : str
        What was sent, where to.
    status : int
    code, said : str
        Of the answer.
    seconds : float
    """

    kind: str
    name: str
    where: str
    status: int
    code: str
    said: str
    seconds: float

    @property
    def is_refused(self) -> bool:
        """Whether the answer is a 4xx with a code and a sentence."""
        return 400 <= self.status < 500 and bool(self.code) and len(self.said.split()) >= 4 and "Trace" not in self.said


def _sent(kind: str, name: str, where: str, answer: httpx.Response) -> Sent:
    try:
        said = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        said = answer.text[:300] if answer.status_code >= 400 else ""
    said = said if isinstance(said, str) else json.dumps(said)
    code = answer.headers.get("X-MSHub-Error", "")
    return Sent(kind, name, where, answer.status_code, code, said[:600], answer.elapsed.total_seconds())


class Sender:
    """Sends files to every place of a server that takes such."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=TIMEOUT_S)
        self._number = 0

    def image(self, name: str, filename: str, content: bytes) -> Iterator[Sent]:
        """Send an image as an upload, as a session and to be segmented."""
        self._number += 1
        params, form = {"image": f"bad{self._number}"}, {"params": json.dumps({"profile": "fast"})}
        one, session = {"file": (filename, content)}, {"files": (filename, content)}
        for where, path, request in (
            ("PUT /datastore/image", "/datastore/image", {"params": params, "files": one}),
            ("PUT /datastore/", "/datastore/", {"params": params, "files": one}),
            ("PUT /session/", "/session/", {"files": session}),
            ("POST /infer", f"/infer/{MODEL}?output=image", {"data": form, "files": one}),
        ):
            yield self._send("NIfTI", name, where, path, **request)

    def series(self, name: str, files: list[tuple[str, bytes]]) -> Sent:
        """Send the files of a series as a session."""
        return _sent(
            "DICOM", name, "PUT /session/", self._client.put("/session/", files=[("files", one) for one in files])
        )

    def label(self, label: BadLabel) -> Sent:
        """Send a label of the first case."""
        files = {"label": (label.filename, label.content)}
        query = {"image": CASES[0], **label.query}
        request = {"params": query, "files": files, "data": {"params": label.params}}
        return self._send("label", label.name, "PUT /datastore/label", "/datastore/label", **request)

    def _send(self, kind: str, name: str, where: str, path: str, **request: Any) -> Sent:
        try:
            return _sent(kind, name, where, self._client.request(where.split()[0], path, **request))
        except httpx.TransportError as error:
            return Sent(kind, name, where, NO_ANSWER, "", f"{type(error).__name__}: {error}", 0.0)

    def good(self) -> list[int]:
        """Send one good file to every place, and remove what it left; returns the statuses."""
        one = ("scan.nii.gz", zipped(image()))
        upload = self._client.put("/datastore/image?image=good", files={"file": one})
        removed = self._client.delete("/datastore/image?id=good")
        sessions = [
            self._client.put("/session/", files=files)
            for files in ([("files", one)], [("files", file) for file in good_series()])
        ]
        ends = [self._client.delete(f"/session/{made.json()['session_id']}") for made in sessions if made.is_success]
        infer = self._client.post(f"/infer/{MODEL}?output=image", data={"params": "{}"}, files={"file": one})
        return [answer.status_code for answer in (upload, removed, *sessions, *ends, infer)]

    def good_label(self, content: bytes) -> int:
        """Send a good label; returns the status."""
        return self.label(BadLabel("good", content)).status

    def stored(self, content: bytes) -> bytes | None:
        """Send an image as a session; returns what the server keeps as this image, None if it refuses it."""
        made = self._client.put("/session/", files={"files": ("scan.nii.gz", content)})
        if made.status_code >= 500:
            raise RuntimeError(f"a flipped bit was answered {made.status_code}: {made.text}")
        if not made.is_success:
            return None
        session = made.json()["session_id"]
        kept = self._client.get(f"/session/{session}?image=true").content
        self._client.delete(f"/session/{session}")
        return kept


def flips(sender: Sender, count: int, folder: Path) -> dict[str, int]:
    """Flip single bits of a gzipped image; returns how many were refused, harmless, and changed voxels unnoticed.

    What is kept is read by nibabel, which does not share a line with the server's own reading.
    """
    content = zipped(image((9, 8, 7)))
    before = _read(content, folder)
    chance, found = random.Random(8), Counter(refused=0, identical=0, changed=0)
    for position in chance.sample(range(8 * len(content)), min(count, 8 * len(content))):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        kept = sender.stored(bytes(flipped))
        if kept is None:
            found["refused"] += 1
        else:
            found["identical" if _same(_read(kept, folder), before) else "changed"] += 1
    return dict(found)


def _read(content: bytes, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    path = folder / "flipped.nii.gz"
    path.write_bytes(content)
    loaded = nib.load(path)
    return np.asanyarray(loaded.dataobj).copy(), loaded.affine


def _same(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> bool:
    return one[0].dtype == other[0].dtype and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def send_all(place: Arena, every: int, count: int) -> dict[str, Any]:
    """Send every so-manieth bad file and `count` flipped bits; returns the figures."""
    sender, first = Sender(place.server.url), nib.load(place.studies / f"{CASES[0]}.nii.gz")
    label = zipped(encoded(good_label(first.shape, first.affine), first.affine))
    welcome = [*sender.good(), sender.good_label(label)]
    images, temporary, before = _images(place), place.left_over(), place.forget_peak()
    sent = [one for bad in islice(bad_nifti(bombs=every == 1), 0, None, every) for one in sender.image(*bad)]
    sent += [sender.series(*bad) for bad in islice(bad_dicom(), 0, None, every)]
    sent += [sender.label(bad) for bad in islice(bad_labels(first.shape, first.affine), 0, None, every)]
    peak, after = place.peak(), place.process.memory_info().rss
    with tempfile.TemporaryDirectory() as scratch:
        flipped = flips(sender, count, Path(scratch))
    final = place.studies / "labels" / "final" / f"{CASES[0]}.nii.gz"
    return {
        "good_files_accepted": all(status < 300 for status in welcome),
        "files": dict(Counter(kind for kind, _ in {(one.kind, one.name) for one in sent})),
        "requests": len(sent),
        "refused": sum(one.is_refused for one in sent),
        "server_errors": sum(one.status >= 500 for one in sent),
        "accepted": sum(one.status < 400 for one in sent),
        "slowest_s": round(max(one.seconds for one in sent), 2),
        "rss_before_mb": round(before / 1e6),
        "rss_growth_mb": round((after - before) / 1e6),
        "rss_peak_growth_mb": round((peak - before) / 1e6),
        "temporary_files_left": sorted(place.left_over() - temporary),
        "images_changed": sorted(images ^ _images(place)),
        "label_kept": final.read_bytes() == label,
        "bit_flips": flipped,
        "not_refused": [asdict(one) for one in sent if not one.is_refused],
        "answers": [asdict(one) for one in sent],
    }


def _images(place: Arena) -> set[str]:
    return {path.name for path in place.studies.iterdir() if path.name.endswith((".nii", ".nii.gz", ".nrrd", ".mha"))}


def holds(figures: dict[str, Any]) -> bool:
    """Return whether all that counts is so."""
    return (
        figures["good_files_accepted"]
        and figures["refused"] == figures["requests"]
        and figures["rss_peak_growth_mb"] * 1e6 < MOST_GROWTH
        and not figures["temporary_files_left"]
        and not figures["images_changed"]
        and figures["label_kept"]
        and figures["bit_flips"]["changed"] == 0
    )


def report(figures: dict[str, Any]) -> str:
    """Return the figures as a table."""
    files = ", ".join(f"{count} {kind}" for kind, count in figures["files"].items())
    flipped = figures["bit_flips"]
    rows = [
        ("bad files", files),
        ("requests", figures["requests"]),
        ("refused with a 4xx, a code and a sentence", figures["refused"]),
        ("answered 5xx", figures["server_errors"]),
        ("accepted", figures["accepted"]),
        ("slowest refusal", f"{figures['slowest_s']} s"),
        ("most memory above the start", f"{figures['rss_peak_growth_mb']} MB"),
        ("temporary files left", len(figures["temporary_files_left"])),
        ("bits flipped: refused, identical, changed", " / ".join(str(flipped[key]) for key in flipped)),
    ]
    return table(("what", "found"), rows)


def main() -> None:
    """Send them all, and end with 1 if one got through."""
    parser = argparse.ArgumentParser(description=re.split(r"\n\n", str(__doc__))[0])
    parser.add_argument("--count", type=int, default=1000, help="bits to flip")
    parser.add_argument("--quick", action="store_true", help=f"every {QUICK}th file, 50 bits")
    options = parser.parse_args()
    with arena() as place:
        figures = send_all(place, QUICK if options.quick else 1, 50 if options.quick else options.count)
    path = keep("bad_files_quick" if options.quick else "bad_files", figures)
    print(report(figures))
    for one in figures["not_refused"]:
        print(f"NOT REFUSED {one['kind']} {one['name']!r} {one['where']}: {one['status']} {one['code']} {one['said']}")
    print(f"figures: {path}")
    sys.exit(0 if holds(figures) else 1)


if __name__ == "__main__":
    main()
