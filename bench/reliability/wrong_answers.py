"""Answers of a PACS that are cut, late, errors, or no answers at all, as cases; the series itself is in order."""

from __future__ import annotations

from collections.abc import Iterator

from pacs_case import FOR_EVER, Case, Workshop, counted, told_or_not
from pacs_ways import changed, cut, instead, redirected, refused, stalled
from wrong_pacs import JSON, MULTIPART, Exchange, Reply, whole

FRAMINGS = ("length", "chunked", "closed")
QUESTIONS = ("series", "instances", "pixels")
PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Please sign in.</body></html>"


def wrong_answers(shop: Workshop) -> Iterator[Case]:
    """Yield a case for every answer."""
    for make in (_cut_between, _cut_within, _cut_in_last, _unclosed, _errors, _stalls, _redirects, _other_pages):
        yield from make(shop)


# -- answers that end early -------------------------------------------------------------------------------------------


def _cut_between(shop: Workshop) -> Iterator[Case]:
    for k in (*shop.positions, shop.n):
        for framing in FRAMINGS:
            for told in (True, False):
                way = {"pixels": cut(lambda reply, k=k: reply.starts[k], framing)}
                name = f"after {k} of {shop.n}, {framing}, {counted(told)}"
                yield shop.case("connection cut after k of n instances", name, told_or_not(told), way)


def _cut_within(shop: Workshop) -> Iterator[Case]:
    for k in shop.three:
        for share in (0.02, 0.3, 0.999):
            for framing in FRAMINGS:
                way = {"pixels": cut(lambda reply, k=k, share=share: _within(reply, k, share), framing)}
                yield shop.case("connection cut within an instance", f"{share} of instance {k}, {framing}", ways=way)


def _within(reply: Reply, k: int, share: float) -> int:
    return int(reply.starts[k] + share * (reply.starts[k + 1] - reply.starts[k]))


def _cut_in_last(shop: Workshop) -> Iterator[Case]:
    for step in range(20):
        way = {"pixels": cut(lambda reply, step=step: _within(reply, -2, (step + 0.5) / 20), "closed")}
        name = f"{step + 0.5} twentieths of the last, unnoticed by HTTP"
        yield shop.case("connection cut within an instance", name, told_or_not(step % 2 == 0), way)


def _unclosed(shop: Workshop) -> Iterator[Case]:
    for framing in FRAMINGS:
        for k in (shop.n - 1, shop.n):

            def way(exchange: Exchange, reply: Reply, k: int = k, framing: str = framing) -> None:
                whole(exchange, Reply(reply.body[: reply.starts[k]], reply.kind), framing)

            yield shop.case(
                "no closing boundary", f"after {k}, {framing}", told_or_not(framing != "closed"), {"pixels": way}
            )


# -- errors, stalls, other pages --------------------------------------------------------------------------------------


def _errors(shop: Workshop) -> Iterator[Case]:
    for question in QUESTIONS:
        for status in (500, 503, 429):
            for times in (1, 2, FOR_EVER):
                name = f"{status} {'always' if times == FOR_EVER else f'{times} times'}, asked for {question}"
                group = "500, 503, 429 for ever" if times == FOR_EVER else "500, 503, 429 once or twice"
                yield shop.case(group, name, ways={question: refused(status, times)})
        for status in (400, 401, 404, 406):
            way = {question: refused(status, FOR_EVER)}
            yield shop.case("400, 401, 404, 406", f"{status}, asked for {question}", ways=way)
    for wait in ("1", "3600", "soon"):
        way = {"pixels": refused(503, 1, Retry_After=wait)}
        yield shop.case("500, 503, 429 once or twice", f"503, Retry-After {wait}", ways=way)


def _stalls(shop: Workshop) -> Iterator[Case]:
    group = "no byte for longer than the time limit"
    for question in QUESTIONS:
        yield shop.case(group, f"before the answer, {question}", ways={question: stalled(None)})
        yield shop.case(group, f"after the head, {question}", ways={question: stalled(lambda reply: 0)})
    for k in (1, shop.n // 2, shop.n - 1):
        way = {"pixels": stalled(lambda reply, k=k: _within(reply, k, 0.5))}
        yield shop.case(group, f"within instance {k}", ways=way)


def _redirects(shop: Workshop) -> Iterator[Case]:
    for question in QUESTIONS:
        for target in ("again", "itself", "http://127.0.0.1:1/elsewhere", "/dicom-web/nowhere"):
            yield shop.case("a redirect", f"{target}, {question}", ways={question: redirected(target)})


def _other_pages(shop: Workshop) -> Iterator[Case]:
    for question in QUESTIONS:
        for name, body in (("a page to sign in", PAGE), ("nothing", b""), ("zeros", bytes(2000))):
            for kind in ("text/html; charset=utf-8", JSON, MULTIPART):
                way = {question: instead(body, kind)}
                yield shop.case("another page with 200", f"{name} as {kind.split(';')[0]}, {question}", ways=way)
        way = {question: instead(b"", "", 204)}
        yield shop.case("another page with 200", f"204, {question}", ways=way)
    for body in (b"{}", b"[{}]", b"[null]", b"[1]", b'"x"', b"null", b"[[]]", b'[{"00080018": 7}]', b"[{", b"\xff"):
        for question in ("series", "instances"):
            way = {question: instead(body, JSON)}
            yield shop.case("another page with 200", f"{body!r}, {question}", ways=way)
    for kind in ("", "text/plain", "application/dicom", "application/octet-stream", "multipart/related", "x", "/;;="):
        way = {"pixels": changed(lambda reply, kind=kind: Reply(reply.body, kind))}
        yield shop.case("a wrong content type", repr(kind), ways=way)
    for boundary in ("other", "", "-"):
        kind = f'multipart/related; type="application/dicom"; boundary={boundary}'
        way = {"pixels": changed(lambda reply, kind=kind: Reply(reply.body, kind))}
        yield shop.case("a wrong content type", f"the boundary {boundary!r}", told_or_not(bool(boundary)), way)
