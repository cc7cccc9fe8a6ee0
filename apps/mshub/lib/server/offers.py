"""Cases that were offered to people in 3D Slicer, which then asks for the image without saying who asks.

MONAI Label's plug-in sends its token with every request but this one: the image of the next case is fetched by Slicer's
own download. So whoever was offered a case may fetch its image from the same address, once and right away.
"""

from __future__ import annotations

import threading
import time

from mshub.users import User

GOOD_FOR_S = 60.0


class Offers:
    """Who may fetch which image from where; may be used by any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[tuple[str, str], tuple[User, float]] = {}

    def make(self, user: User, image: str, address: str) -> None:
        """Let whoever is at `address` fetch an image, in the name of `user`."""
        now = time.monotonic()
        with self._lock:
            self._open = {key: offer for key, offer in self._open.items() if offer[1] > now}
            self._open[image, address] = user, now + GOOD_FOR_S

    def take(self, image: str, address: str) -> User | None:
        """Return in whose name an image may be fetched, this once; None if nobody was offered it there."""
        with self._lock:
            user, ends = self._open.pop((image, address), (None, 0.0))
        return user if ends > time.monotonic() else None
