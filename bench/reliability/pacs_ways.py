"""Ways in which a PACS gives its answers, right and wrong: for `wrong_pacs.WrongPacs.misbehave`."""

from __future__ import annotations

from collections.abc import Callable

from wrong_pacs import JSON, Exchange, Reply, Way, told, whole

STALLED_S = 60.0
"""The longest a stalled answer is held; `WrongPacs.release` ends it."""

# -- ways -------------------------------------------------------------------------------------------------------------


def in_frame(framing: str) -> Way:
    """Return a way to give the whole answer in one framing."""
    return lambda exchange, reply: whole(exchange, reply, framing)


def cut(where: Callable[[Reply], int], framing: str) -> Way:
    """Return a way to send an answer up to one byte and then hang up."""

    def way(exchange: Exchange, reply: Reply) -> None:
        exchange.begin(reply, framing)
        exchange.send_part(reply.body[: where(reply)], framing)
        exchange.hang_up()

    return way


def stalled(where: Callable[[Reply], int] | None) -> Way:
    """Return a way to send an answer up to one byte (None: not even its head) and then nothing more for long."""

    def way(exchange: Exchange, reply: Reply) -> None:
        release = exchange.pacs.release
        if where is not None:
            exchange.begin(reply)
            exchange.send_part(reply.body[: where(reply)], "length")
        release.wait(STALLED_S)
        exchange.hang_up()

    return way


def refused(status: int, times: int, **headers: str) -> Way:
    """Return a way to answer with an error so many times, and well afterwards."""
    left = [times]

    def way(exchange: Exchange, reply: Reply) -> None:
        left[0] -= 1
        if left[0] < 0:
            return whole(exchange, reply)
        error = Reply(b"not now", "text/plain", status)
        exchange.begin(error, **headers)
        exchange.send_part(error.body, "length")
        return None

    return way


def instead(body: bytes, kind: str, status: int = 200) -> Way:
    """Return a way to send something else."""
    return lambda exchange, reply: whole(exchange, Reply(body, kind, status))


def changed(change: Callable[[Reply], Reply]) -> Way:
    """Return a way to send an answer with something changed."""
    return lambda exchange, reply: whole(exchange, change(reply))


def redirected(target: str) -> Way:
    """Return a way to send who asks somewhere else; ``again``: to the same address with a mark, which is answered."""

    def way(exchange: Exchange, reply: Reply) -> None:
        if "moved" in exchange.path:
            return whole(exchange, reply)
        there = f"{exchange.path}{'&' if '?' in exchange.path else '?'}moved=1" if target == "again" else target
        moved = Reply(b"", "", 302)
        exchange.begin(moved, Location=there if target != "itself" else exchange.path)
        return None

    return way


# -- storing ----------------------------------------------------------------------------------------------------------


def not_kept(status: int, kind: str = JSON, body: bytes | None = None) -> Way:
    """Return a way to keep nothing; without a `body`, the answer lists the object as failed."""

    def way(exchange: Exchange, reply: Reply) -> None:
        seg = exchange.take()
        exchange.pacs.stored.remove(seg)
        whole(exchange, Reply(told("FailedSOPSequence", seg) if body is None else body, kind, status))

    return way


def kept_silently(exchange: Exchange, reply: Reply) -> None:
    """Keep the object and say nothing of it."""
    exchange.take()
    whole(exchange, Reply(b"", ""))


def kept_and_cut(exchange: Exchange, reply: Reply) -> None:
    """Keep the object and hang up."""
    exchange.take()
    exchange.hang_up()
