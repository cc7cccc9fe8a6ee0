"""People at work: the requests of viewers and scripts, mixed as chance has it, and what became of each.

Each person has an image of their own, uploads it and labels it again and again; what the server said is stored is
looked for byte for byte in the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from arena import CASES, MODEL, Arena
from bad_labels import NAMES
from bad_nifti import AFFINE, encoded, image, zipped

SHAPE = (19, 23, 17)
TIMEOUT_S = 600
LONGEST_PAUSE_S = 5.0
ATTEMPTS = 100
LABEL_PARAMS = json.dumps({"label_info": [{"name": name, "idx": value} for name, value in NAMES.items()]})


@dataclass
class Journal:
    """What was asked, by whomever, and how it ended; may be used by any number of threads.

    Attributes
    ----------
    seconds : dict
        Kind of request -> how long each took, pauses before another attempt left out.
    wrong : list of str
        Requests that did not end as they should.
    busy : int
        503 with a ``Retry-After``: asked again afterwards.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    wrong: list[str] = field(default_factory=list)
    busy: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def took(self, kind: str, seconds: float) -> None:
        """Note one request."""
        with self.lock:
            self.seconds[kind].append(seconds)

    def went_wrong(self, what: str) -> None:
        """Note a request that did not end as it should."""
        with self.lock:
            self.wrong.append(what)

    def was_busy(self) -> None:
        """Note a request that has to be sent again."""
        with self.lock:
            self.busy += 1

    @property
    def requests(self) -> int:
        """How many there were."""
        with self.lock:
            return sum(map(len, self.seconds.values()))


class Person:
    """One client with an own image.

    Parameters
    ----------
    url : str
    token : str
        Of an API user; empty on a server without users.
    name : str
        Id of the own image as well.
    journal : Journal
    seed : int
    """

    def __init__(self, url: str, token: str, name: str, journal: Journal, seed: int) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.client = httpx.Client(base_url=url, timeout=TIMEOUT_S, headers=headers)
        self.name, self.journal, self.chance = name, journal, random.Random(seed)
        self.image = zipped(image(SHAPE))
        self.labels: list[str] = []
        self._sent = 0
        self._kinds: dict[Callable[[], None], int] = {
            self.info: 8, self.status: 4, self.studies: 4, self.picture: 4, self.next_case: 4, self.label: 3,
            self.own_label: 2, self.predict: 1, self.upload: 1, self.session: 1, self.bad_file: 1, self.unknown: 1,
        }  # fmt: skip

    def work(self, requests: int) -> None:
        """Begin, and send so many requests, or a few more."""
        self.begin()
        sent = 0
        while sent < requests:
            sent += self.one_thing()

    def begin(self) -> None:
        """Upload the own image."""
        self._ask("upload", "PUT", f"/datastore/image?image={self.name}", files=self._files(self.image))

    def one_thing(self) -> int:
        """Do one thing people do; returns how many requests it took."""
        before = self._sent
        (what,) = self.chance.choices([*self._kinds], [*self._kinds.values()])
        try:
            what()
        except httpx.TransportError as error:
            self.journal.went_wrong(f"{what.__name__}: no answer, {type(error).__name__}: {error}")
            self._sent += 1
        return self._sent - before

    def info(self) -> None:
        """What a viewer asks first."""
        self._ask("info", "GET", "/info/")

    def status(self) -> None:
        """What a viewer asks while it waits."""
        self._ask("status", "GET", "/mshub/status")

    def studies(self) -> None:
        """What is there."""
        self._ask("list of images", "GET", "/datastore/?output=all")

    def picture(self) -> None:
        """Download an image."""
        self._ask("download of an image", "GET", f"/datastore/image?image={self.chance.choice(CASES)}")

    def next_case(self) -> None:
        """Ask for the next case."""
        self._ask("next case", "POST", "/activelearning/random", json={"client_id": self.name})

    def label(self) -> None:
        """Submit a label of the own image."""
        array = np.zeros(SHAPE, np.uint8)
        bits = np.unpackbits(np.frombuffer(self.chance.randbytes(64), np.uint8))
        array.reshape(-1)[: len(bits)] = bits + 1
        content = zipped(encoded(array, AFFINE))
        query = f"/datastore/label?image={self.name}&tag=final"
        self._ask("label", "PUT", query, files={"label": ("label.nii.gz", content)}, data={"params": LABEL_PARAMS})
        self.labels.append(_digest(content))

    def own_label(self) -> None:
        """Download the own label, which is the last one submitted."""
        if self.labels:
            found = self._ask("download of a label", "GET", f"/datastore/label?label={self.name}&tag=final")
            if _digest(found.content) != self.labels[-1]:
                self.journal.went_wrong(f"the label of {self.name} is not the last one submitted")

    def predict(self) -> None:
        """Let the model segment an image."""
        case = self.chance.choice((*CASES, self.name))
        body = {"data": {"params": '{"profile": "fast"}'}}
        found = self._ask("prediction", "POST", f"/infer/{MODEL}?image={case}&output=image", **body)
        if found.is_success and len(found.content) < 100:
            self.journal.went_wrong(f"the prediction of {case} has {len(found.content)} bytes")

    def upload(self) -> None:
        """Upload another image, and remove it."""
        other = f"{self.name}-more"
        self._ask("upload", "PUT", f"/datastore/image?image={other}", files=self._files(self.image))
        self._ask("removal", "DELETE", f"/datastore/image?id={other}")

    def session(self) -> None:
        """Segment an image that is not in the studies folder."""
        made = self._ask("session", "PUT", "/session/", files={"files": ("scan.nii.gz", self.image)})
        name, body = made.json().get("session_id"), {"data": {"params": '{"profile": "fast"}'}}
        self._ask("prediction", "POST", f"/infer/{MODEL}?session_id={name}&output=image", **body)
        self._ask("session", "DELETE", f"/session/{name}")

    def bad_file(self) -> None:
        """Upload what is no image; it is refused."""
        cut = self.image[: len(self.image) // 2]
        self._ask("refused upload", "PUT", f"/datastore/image?image={self.name}-bad", 400, files=self._files(cut))

    def unknown(self) -> None:
        """Ask for an image that is not there."""
        self._ask("unknown image", "POST", f"/infer/{MODEL}?image=nobody", 404)

    def hang_up(self) -> None:
        """Ask for a prediction, and do not wait for it."""
        started = time.monotonic()
        with contextlib.suppress(httpx.TimeoutException):
            self.client.post(f"/infer/{MODEL}?image={CASES[0]}", data={"params": "{}"}, timeout=0.05)
        self.journal.took("hang-up", time.monotonic() - started)
        self._sent += 1

    def check(self) -> int:
        """Look for every label that was acknowledged; returns how many are missing."""
        objects = self.client.get("/datastore/?output=all").json()["objects"]
        tags = objects[self.name]["labels"]
        kept = {_digest(self.client.get(f"/datastore/label?label={self.name}&tag={tag}").content) for tag in tags}
        return len(set(self.labels) - kept)

    def _ask(self, kind: str, method: str, path: str, expected: int = 200, **request: Any) -> httpx.Response:
        """Send a request, again while the server is busy; an answer of another kind is noted."""
        for _ in range(ATTEMPTS):
            started = time.monotonic()
            answer = self.client.request(method, path, **request)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or "Retry-After" not in answer.headers:
                break
            self.journal.was_busy()
            time.sleep(min(float(answer.headers["Retry-After"]), LONGEST_PAUSE_S))
        self.journal.took(kind, time.monotonic() - started)
        self._sent += 1
        if answer.status_code // 100 != expected // 100:
            self.journal.went_wrong(f"{kind}: {answer.status_code} {answer.text[:200]}")
        return answer

    def _files(self, content: bytes) -> dict[str, tuple[str, bytes]]:
        return {"file": ("scan.nii.gz", content)}


def crowd(place: Arena, name: str, count: int, journal: Journal) -> list[Person]:
    """Return so many people, called by `name` and a number, each with a chance of their own."""
    return [Person(place.server.url, place.token, f"{name}{n}", journal, seed=n) for n in range(count)]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def percentile(seconds: Sequence[float], percent: float) -> float:
    """Return what so many per cent of the values do not exceed."""
    return float(np.percentile(seconds, percent, method="higher"))


def latencies(journal: Journal) -> list[tuple[str, int, str, str, str]]:
    """Return rows of kind, number, and median, 99th percentile and most in milliseconds."""
    return [
        (kind, len(took), *(f"{1000 * value:.0f}" for value in (np.median(took), percentile(took, 99), max(took))))
        for kind, took in sorted(journal.seconds.items())
    ]


def kinds_of(wrong: Sequence[str]) -> dict[str, int]:
    """Return what went wrong, and how often."""
    return dict(Counter(wrong))
