"""What the server does while nobody needs it: batches of pre-labels, and looking at cases for the strategies.

One thread takes one case at a time. It never stands in a clinician's way: a prediction that a client asks for ends the
thread's own before its next pass of the network, and the case is taken again later. Looking at cases, which nobody
asked for, also waits until the server has been idle for a while, keeps to its budget, and leaves the machine to
trainings.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

from fastapi import HTTPException

from lib.activelearning.casebook import FINAL, Casebook, image_state, label_state
from lib.activelearning.offers import labelled, unlabelled
from lib.activelearning.prelabels import Prelabels
from lib.activity import Activity
from lib.conf import Config
from lib.datastore import StudiesFolder
from mshub.case_index import Batch
from mshub.errors import Interrupted, MSHubError, PredictionError
from mshub.jobs import Jobs
from mshub.nnunet.sliding_window import Check
from mshub.store import ModelStore, ModelVersion

logger = logging.getLogger(__name__)

IDLE_S, BETWEEN_S, PAUSE_S, TROUBLE_S = 30.0, 2.0, 20.0, 60.0
"""Seconds without a request until cases are looked at, until a batch goes on; between looks for work; after trouble."""
HOUR_S, DAY_S = 3600.0, 86400.0
TRIES = 3
"""So often a case is tried that meets with trouble which may not be its own; one to look at rests for a day then."""
INTEREST_DAYS = 14
"""Cases are looked at for models that somebody used in so many days."""


class Look(Protocol):
    """What can be done with a case; ends by `Interrupted` when `check` says so."""

    def measure(self, version: ModelVersion, image: str, check: Check) -> None:
        """Measure how sure the model is of an image, and keep it."""

    def compare(self, version: ModelVersion, image: str, check: Check) -> None:
        """Predict a labelled image, and keep how sure the model is and how its label agrees."""

    def prelabel(self, version: ModelVersion, image: str, check: Check) -> None:
        """Predict an image and keep the label."""


@dataclass(frozen=True)
class _Task:
    """One case to look at."""

    version: ModelVersion
    image: str
    act: Callable[[ModelVersion, str, Check], None]


class SpareTime(threading.Thread):
    """The thread; `stop` ends it.

    Parameters
    ----------
    casebook, prelabels, store, config, activity, jobs
        The app's.
    look : Look
    datastore : callable
        Returns the datastore.
    served : callable
        Returns the ids of the models that are served.
    modalities : callable
        Returns which series of a PACS a version is for.
    """

    def __init__(
        self,
        casebook: Casebook,
        prelabels: Prelabels,
        store: ModelStore,
        config: Config,
        activity: Activity,
        jobs: Jobs,
        look: Look,
        datastore: Callable[[], StudiesFolder],
        served: Callable[[], list[str]],
        modalities: Callable[[ModelVersion], list[str]],
    ) -> None:
        super().__init__(name="mshub-spare-time", daemon=True)
        self._casebook, self._prelabels, self._store, self._config = casebook, prelabels, store, config
        self._activity, self._jobs, self._look = activity, jobs, look
        self._datastore, self._served, self._modalities = datastore, served, modalities
        self._ended, self._woken = threading.Event(), threading.Event()
        self._spent: deque[tuple[float, float]] = deque()
        self._doing: dict[str, Any] | None = None
        self._tries: Counter[tuple[object, ...]] = Counter()
        self._aside: dict[tuple[object, ...], float] = {}

    def run(self) -> None:
        """Work until `stop`."""
        is_recovered = False
        while not self._ended.is_set():
            try:
                if not is_recovered:
                    self._casebook.index.recover()
                    is_recovered = True
                pause = self.once()
            except (MSHubError, HTTPException) as error:  # the PACS does not answer, a file is locked
                logger.info("no case is looked at now: %s", _reason_of(error))
                is_recovered, pause = False, TROUBLE_S
            except Exception:  # whatever it is, the server goes on and so does this
                logger.exception("looking at cases failed; it is tried again")
                is_recovered, pause = False, TROUBLE_S
            self._woken.wait(pause)
            self._woken.clear()

    def stop(self) -> None:
        """End the thread, before the next pass of a network."""
        self._ended.set()
        self._woken.set()

    def wake(self) -> None:
        """Look for work now: a batch was started."""
        self._woken.set()

    def doing(self) -> dict[str, Any] | None:
        """Return model and image that are looked at now, or None."""
        return self._doing

    def once(self) -> float:
        """Do what is to be done for one case, and return how many seconds to wait for the next."""
        if self._activity.idle_s() < BETWEEN_S:
            return BETWEEN_S
        batch = next(iter(self._casebook.index.open_batches()), None)
        if batch is not None:
            return self._go_on(batch)
        if not self._may_look():
            return PAUSE_S
        task = next(self._tasks(), None)
        if task is None:
            return PAUSE_S
        self._do(task)
        return 0.0

    # -- batches ------------------------------------------------------------------------------------------------

    def _go_on(self, batch: Batch) -> float:
        """Pre-label the next case of a batch."""
        index, image = self._casebook.index, self._casebook.index.next_item(batch.id)
        if image is None:
            return BETWEEN_S
        try:
            version = self._store.current(batch.model)
            again = bool(batch.options.get("again"))
            reason = self._prelabels.reason_to_skip(self._datastore(), image, version, again)
            if reason is None:
                with self._shown(batch.model, image, "prelabelling"):
                    self._look.prelabel(version, image, self._check)
        except Exception as error:
            return self._broke_off(batch, image, error)
        index.finish_item(batch.id, image, "skipped" if reason else "done", reason or "")
        return 0.0

    def _broke_off(self, batch: Batch, image: str, error: Exception) -> float:
        """Let an image wait again for which another time is worth a try; others have failed."""
        reason = _reason_of(error)
        if self._is_worth_a_try(error, batch.id, image):
            self._casebook.index.recover()
            logger.info("%s waits: %s", image, reason)
            return BETWEEN_S if _is_interrupted(error) else TROUBLE_S
        logger.warning("no pre-label of %s: %s", image, reason)
        caption = self._datastore().caption(image)
        self._casebook.index.finish_item(batch.id, image, "failed", f"{caption}: {reason}" if caption else reason)
        return 0.0

    # -- looking at cases -----------------------------------------------------------------------------------------

    def _may_look(self) -> bool:
        """Return whether the server is idle, nothing is trained, and some of the hour's budget is left."""
        now = time.monotonic()
        while self._spent and self._spent[0][0] < now - HOUR_S:
            self._spent.popleft()
        left = self._config.idle_minutes * 60 - sum(seconds for _, seconds in self._spent)
        return left > 0 and self._activity.idle_s() >= IDLE_S and not self._jobs.open()

    def _tasks(self) -> Iterator[_Task]:
        """Yield what is not known yet of the cases of the models in use: those that wait first."""
        datastore = self._datastore()
        for model in self._models():
            version = self._store.current(model)
            states = self._casebook.index.states(model, version.version)
            waiting = _sample(unlabelled({"modalities": self._modalities(version)}, datastore), self._config.idle_cases)
            for image in waiting:
                if states.get(image) != image_state(datastore, image) and not self._is_aside(version, image):
                    yield _Task(version, image, self._look.measure)
            yield from self._unlooked(version, datastore, states)

    def _unlooked(self, version: ModelVersion, datastore: StudiesFolder, states: dict[str, str]) -> Iterator[_Task]:
        """Yield labelled cases that the version has not been compared with, as they are now."""
        index, names = self._casebook.index, set(version.record["labels"])
        known = index.label_dice(version.model_id, version.version)
        failed = index.failures(version.model_id, version.version).keys()
        for image in labelled({}, datastore):
            label, _ = known.get(image, ("", {}))
            reviewed = datastore.get_label_info(image, FINAL).get("reviewed") or names
            in_vain = self._is_aside(version, image)
            in_vain |= image in failed and states[image] == image_state(datastore, image)
            if names.intersection(reviewed) and label != label_state(datastore, image) and not in_vain:
                yield _Task(version, image, self._look.compare)

    def _models(self) -> list[str]:
        """Return the models somebody used lately, or the only one there is."""
        served = self._served()
        used = self._casebook.index.interests(time.time() - INTEREST_DAYS * DAY_S)
        return [model for model in used if model in served] or (served if len(served) == 1 else [])

    def _do(self, task: _Task) -> None:
        started = time.monotonic()
        try:
            with self._shown(task.version.model_id, task.image, "looking"):
                task.act(task.version, task.image, self._check_idle)
        except Exception as error:
            if _is_interrupted(error):
                return
            key = _key(task.version, task.image)
            if self._is_worth_a_try(error, *key):
                raise
            if _is_trouble(error):
                logger.warning("%s: %s is left alone for a day: %s", task.version.model_id, task.image, error)
                self._aside[key] = time.monotonic() + DAY_S
            else:
                self._cannot(task, _reason_of(error))
        finally:
            self._spent.append((time.monotonic(), time.monotonic() - started))

    def _is_worth_a_try(self, error: Exception, *key: object) -> bool:
        """Return whether the same may go well another time: that is seen a few times, or whenever the PACS answers."""
        if _is_interrupted(error) or _status_of(error) == HTTPStatus.SERVICE_UNAVAILABLE:
            return True
        if not _is_trouble(error):
            return False
        self._tries[key] += 1
        if self._tries[key] < TRIES:
            return True
        del self._tries[key]
        return False

    def _is_aside(self, version: ModelVersion, image: str) -> bool:
        return self._aside.get(_key(version, image), 0.0) > time.monotonic()

    def _cannot(self, task: _Task, reason: str) -> None:
        """Note that an image cannot be looked at, so that it is not tried again and again."""
        logger.info("%s cannot look at %s: %s", task.version.model_id, task.image, reason)
        state = image_state(self._datastore(), task.image)
        self._casebook.index.keep_failure(task.image, task.version.model_id, task.version.version, reason, state)

    # -- giving way -----------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._ended.is_set() or self._activity.idle_s() == 0:
            raise Interrupted("Somebody else goes first.")

    def _check_idle(self) -> None:
        self._check()
        if self._casebook.index.open_batches():
            raise Interrupted("A batch of pre-labels goes first.")

    @contextmanager
    def _shown(self, model: str, image: str, what: str) -> Iterator[None]:
        """Tell what is being done for as long as the block runs."""
        self._doing = {"model": model, "image": image, "doing": what}
        try:
            yield
        finally:
            self._doing = None


def _sample(images: Sequence[str], most: int) -> list[str]:
    """Return at most so many of the images, always the same ones, as good as drawn at random."""
    return sorted(images, key=lambda image: hashlib.sha256(image.encode()).digest())[:most]


def _key(version: ModelVersion, image: str) -> tuple[str, str, str]:
    return version.model_id, version.version, image


def _is_trouble(error: Exception) -> bool:
    """Return whether it may be the machine's or the PACS' fault, such as a GPU that fails, and not the image's."""
    if not isinstance(error, MSHubError | HTTPException | OSError) or _status_of(error) >= 500:
        return True
    return PredictionError.code in (getattr(error, "code", ""), _code_in(error))


def _code_in(error: Exception) -> str:
    headers = getattr(error, "headers", None) or {}
    return str(headers.get("X-MSHub-Error", ""))


def _is_interrupted(error: Exception) -> bool:
    return isinstance(error, Interrupted) or _code_in(error) == Interrupted.code


def _status_of(error: Exception) -> int:
    return int(getattr(error, "status_code", None) or getattr(error, "http_status", None) or 400)


def _reason_of(error: Exception) -> str:
    return str(getattr(error, "detail", None) or error)
