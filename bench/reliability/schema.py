"""Every operation of the server's own description, asked by schemathesis: no answer is a 5xx, and the server lives on.

    python bench/reliability/schema.py                # 20,000 cases, a sixth of them as an admin: half an hour
    python bench/reliability/schema.py --quick        # a few hundred
    python bench/reliability/schema.py --count 5000   # so many
    python bench/reliability/schema.py --seed 7       # others

What ``/openapi.json`` leaves out and `lib.server.permissions` lets through is asked as well, and HEAD where GET is.
Many cases hold values that name something here (schema_hooks.py). Figures: bench/out/reliability/schema.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib

from arena import CASES, MIB, MODEL, ROOT, Arena, arena, keep, table
from bad_labels import NAMES, good_label
from bad_nifti import encoded, zipped
from mshub.selection import STRATEGIES
from mshub.users import user_file

HERE = Path(__file__).resolve().parent
SHARE_AS_ADMIN = 6
"""One of so many cases is asked of a server with users, by an admin."""
EXAMPLES = 100
"""Cases of an operation in one go of schemathesis; there are goes until there are enough cases."""
PIECE_TIMEOUT_S = 1800
MOST_GROWTH = 200 * MIB
DELIBERATE = (503, 507)
"""Busy, full: answers that are meant."""
SEGMENTS = [{"name": name, "idx": value} for name, value in NAMES.items()]
STARTED = ("/train/", "/batch/infer", "/scoring/")
"""Where DELETE ends what was started."""
SETTLE_S = 120
"""The longest that takes."""
SESSIONS = "home/sessions/"
"""Where what was sent may stay, for an hour."""


@dataclass
class Asked:
    """What came of the cases.

    Attributes
    ----------
    statuses : dict
        Of each operation: how often it was answered how; status 0 is no answer.
    faults : list of str
        Requests that were answered 5xx, and not on purpose, or not at all.
    errors : list of str
        What schemathesis itself could not do.
    """

    statuses: dict[str, Counter[int]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """How many there were."""
        return sum(found.total() for found in self.statuses.values())

    def read(self, report: Path) -> None:
        """Take over what schemathesis reports, a line of JSON per event."""
        for line in report.read_text().splitlines():
            kind, event = next(iter(json.loads(line).items()))
            if kind == "ScenarioFinished":
                self._note(event["recorder"])
            elif kind in ("NonFatalError", "FatalError"):
                self.errors.append(json.dumps(event)[:600])

    def _note(self, recorder: dict[str, Any]) -> None:
        found = self.statuses.setdefault(recorder["label"], Counter())
        for one in recorder.get("interactions", {}).values():
            status = (one.get("response") or {}).get("status_code", 0)
            found[status] += 1
            if (status >= 500 and status not in DELIBERATE) or not status:
                request = one["request"]
                self.faults.append(f"{status} {request['method']} {request['uri']} {str(request.get('body'))[:400]}")


def known(place: Arena, url: str) -> dict[str, list[Any]]:
    """Return values that name something on the server, by parameter; makes a session for it."""
    image = (place.studies / f"{CASES[0]}.nii.gz").read_bytes()
    made = httpx.put(f"{url}/session/", files={"files": ("scan.nii.gz", image)}, timeout=60).raise_for_status()
    spare = [f"spare{number}" for number in range(3)]
    return {
        "image": [*CASES], "label": [*CASES], "tag": ["final", "original"], "model": [MODEL], "method": ["dice"],
        "strategy": [*STRATEGIES], "batch": [1, 2, 3], "name": ["v1"], "session_id": [made.json()["session_id"]],
        "path": ["index.html", "studies", "assets", "..", ""], "format": ["nrrd", "dicom_seg"], "lines": [5],
        "params": ["{}", json.dumps({"label_info": SEGMENTS}), json.dumps({"profile": "fast", "client_id": "me"})],
        "info": ["{}", json.dumps({"note": "seen"})], "token": [""], "username": ["ada"], "password": ["wrong"],
        "PUT /datastore/image image": spare, "PUT /datastore/ image": spare, "DELETE /datastore/image id": spare,
        "DELETE /datastore/ id": spare, "DELETE /datastore/label id": [CASES[1]],
        "DELETE /session/{session_id} session_id": ["gone"],
    }  # fmt: skip


def lay_out(place: Arena) -> Path:
    """Write what schema_hooks.py reads; returns the folder."""
    folder = place.folder / "known"
    folder.mkdir(exist_ok=True)
    first = nib.load(place.studies / f"{CASES[0]}.nii.gz")
    label = zipped(encoded(good_label(first.shape, first.affine), first.affine))
    (folder / "label.nii.gz").write_bytes(label)
    (folder / "image.nii.gz").write_bytes((place.studies / f"{CASES[1]}.nii.gz").read_bytes())
    (folder / "known.json").write_text(json.dumps(known(place, place.server.url)))
    for case in CASES:
        sent = {"label": ("label.nii.gz", label)}, {"params": json.dumps({"label_info": SEGMENTS})}
        url = f"{place.server.url}/datastore/label?image={case}"
        httpx.put(url, files=sent[0], data=sent[1], timeout=60).raise_for_status()
    return folder


def ask(place: Arena, folder: Path, asked: Asked, *, examples: int, seed: int, edges: bool, token: str = "") -> None:
    """Let schemathesis ask for every operation once more, with all edges of the description or without."""
    report = place.folder / f"asked-{seed}-{bool(token)}.ndjson"
    report.unlink(missing_ok=True)
    command = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(HERE / "schema.toml"), "run"]
    command += [f"{place.server.url}/openapi.json", "--max-examples", str(examples), "--seed", str(seed), "--no-color"]
    command += ["--phases", "coverage,fuzzing" if edges else "fuzzing"]
    command += ["--report", "ndjson", "--report-ndjson-path", str(report)]
    command += ["--header", f"Authorization: Bearer {token}"] if token else []
    paths = os.pathsep.join([str(HERE), str(ROOT / "apps" / "mshub")])
    environment = {**os.environ, "PYTHONPATH": paths, "BENCH_KNOWN": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PIECE_TIMEOUT_S)
    if not report.is_file():
        raise RuntimeError(f"schemathesis ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    asked.read(report)
    end_all(place, token)


def goes(asked: Asked, count: int, seed: int) -> Iterator[int]:
    """Yield seeds until there are enough cases."""
    while asked.cases < count:
        before = asked.cases
        yield seed
        seed += 1
        if asked.cases == before:
            raise RuntimeError(f"schemathesis asked nothing: {asked.errors[:3]}")


def ask_all(place: Arena, count: int, *, seed: int = 1, quick: bool = False) -> dict[str, Any]:
    """Ask `count` cases, the last of them of a server with users, as an admin; returns the figures."""
    began, examples = time.monotonic(), 1 if quick else EXAMPLES
    folder = lay_out(place)
    temporary, threads, before = place.left_over(), place.process.num_threads(), place.forget_peak()
    alone, admin = Asked(), Asked()
    for one in goes(alone, count - count // SHARE_AS_ADMIN, seed):
        ask(place, folder, alone, examples=examples, seed=one, edges=not quick and one == seed)
    after = place.process.memory_info().rss
    token = make_admin(place)
    for one in goes(admin, count // SHARE_AS_ADMIN, seed):
        ask(place, folder, admin, examples=1 + examples // 2, seed=one, edges=not quick and one == seed, token=token)
    peak, lives, left = place.peak(), predicts(place, token), left_of(place, temporary)
    return {
        "seconds": round(time.monotonic() - began),
        "without_users": figures_of(alone),
        "as_admin": figures_of(admin),
        "lives": lives,
        "rss_before_mb": round(before / 1e6),
        "rss_growth_mb": round((after - before) / 1e6),
        "rss_peak_growth_mb": round((peak - before) / 1e6),
        "threads_before": threads,
        "threads_after": place.process.num_threads(),
        "processes_left": [" ".join(child.cmdline())[:200] for child in place.process.children(recursive=True)],
        "temporary_files_left": _temporary(left),
        "sessions_kept": len(left) - len(_temporary(left)),
        "traces_in_log": place.server.log.read_text(errors="replace").count("Traceback"),
    }


def make_admin(place: Arena) -> str:
    """Make the server one with users; returns an admin's token."""
    users = user_file(place.home)
    users.add("ada", "correct horse battery staple", "admin")
    return users.create_token("ada", "bench", days=1)


def end_all(place: Arena, token: str = "") -> None:
    """End the processes that cases started; those that wait for their turn begin, and are ended too."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    deadline, quiet = time.monotonic() + SETTLE_S, 0
    while quiet < 3 and time.monotonic() < deadline:
        for path in STARTED:
            httpx.delete(f"{place.server.url}{path}", headers=headers, timeout=120)
        time.sleep(0.5)
        quiet = 0 if place.process.children(recursive=True) else quiet + 1


def predicts(place: Arena, token: str) -> bool:
    """Return whether the server still predicts."""
    url, headers = f"{place.server.url}/infer/{MODEL}", {"Authorization": f"Bearer {token}"}
    query = {"image": CASES[0], "output": "image"}
    answer = httpx.post(url, params=query, data={"params": "{}"}, headers=headers, timeout=120)
    return answer.status_code == 200 and len(answer.content) > 100


def left_of(place: Arena, before: set[str]) -> set[str]:
    """Return the files that are left; those of the last answer go once it is sent."""
    deadline = time.monotonic() + 10
    while _temporary(left := place.left_over() - before) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def _temporary(names: set[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith(SESSIONS))


def figures_of(asked: Asked) -> dict[str, Any]:
    """Return what came of some cases."""
    total: Counter[int] = sum(asked.statuses.values(), Counter())
    answered = {name: dict(sorted(found.items())) for name, found in sorted(asked.statuses.items())}
    return {
        "operations": len(asked.statuses),
        "cases": asked.cases,
        "statuses": dict(sorted(total.items())),
        "succeeded": sum(count for status, count in total.items() if 200 <= status < 300),
        "operations_that_succeeded": sum(any(200 <= one < 300 for one in found) for found in asked.statuses.values()),
        "busy_or_full": sum(total[status] for status in DELIBERATE),
        "faults": asked.faults,
        "errors": asked.errors,
        "by_operation": answered,
    }


def holds(figures: dict[str, Any]) -> bool:
    """Return whether nothing was answered 5xx that is not meant so, and the server is as it was."""
    both = (figures["without_users"], figures["as_admin"])
    return (
        not any(one["faults"] for one in both)
        and figures["lives"]
        and figures["rss_peak_growth_mb"] * 1e6 < MOST_GROWTH
        and not figures["temporary_files_left"]
        and not figures["processes_left"]
        and not figures["traces_in_log"]
    )


def report(figures: dict[str, Any]) -> str:
    """Return the figures as a table."""
    both = (figures["without_users"], figures["as_admin"])
    rows = [
        ("operations", *(one["operations"] for one in both)),
        ("cases", *(one["cases"] for one in both)),
        ("answered 5xx", *(len(one["faults"]) for one in both)),
        ("answered busy (503) or full (507), which is meant", *(one["busy_or_full"] for one in both)),
        ("answered 2xx", *(f"{one['succeeded'] / max(1, one['cases']):.0%}" for one in both)),
        ("operations that answered 2xx", *(one["operations_that_succeeded"] for one in both)),
        ("cases schemathesis itself could not make", *(len(one["errors"]) for one in both)),
        ("answers", *(", ".join(f"{count} x {status}" for status, count in one["statuses"].items()) for one in both)),
        (
            "memory above that of the start: before users, most",
            f"{figures['rss_growth_mb']}, {figures['rss_peak_growth_mb']} MB",
            "",
        ),
        ("threads at the start, at the end", f"{figures['threads_before']}, {figures['threads_after']}", ""),
        (
            "temporary files left, processes left",
            f"{len(figures['temporary_files_left'])}, {len(figures['processes_left'])}",
            "",
        ),
        ("traces in the server's log", figures["traces_in_log"], ""),
        ("the server predicts afterwards", "yes" if figures["lives"] else "no", ""),
    ]
    return table(("what", "without users", "as an admin"), rows)


def main() -> None:
    """Ask them all, and end with 1 if a 5xx was among the answers."""
    parser = argparse.ArgumentParser(description=re.split(r"\n\n", str(__doc__))[0])
    parser.add_argument("--count", type=int, default=20_000, help="cases")
    parser.add_argument("--seed", type=int, default=1, help="the first of those schemathesis is given")
    parser.add_argument("--quick", action="store_true", help="a few hundred cases")
    options = parser.parse_args()
    with arena() as place:
        figures = ask_all(place, 200 if options.quick else options.count, seed=options.seed, quick=options.quick)
    path = keep("schema_quick" if options.quick else "schema", figures)
    print(report(figures))
    for one in (figures["without_users"], figures["as_admin"]):
        for found in [*one["faults"], *one["errors"]][:40]:
            print(f"FOUND {found}")
    print(f"figures: {path}")
    sys.exit(0 if holds(figures) else 1)


if __name__ == "__main__":
    main()
