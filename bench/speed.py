"""MSHub's predictions beside nnU-Net's own tools: time, memory, and whether the labels are the same.

    python bench/speed.py                          # all but the server; writes docs/performance.md and its plots
    python bench/speed.py export --repeats 3       # one part: export, preprocessing, request, gpu or server
    python bench/speed.py --quick                  # small, in bench/out/speed-quick: does everything still run
    python bench/speed.py --report-only            # tables and plots of the last results

Every arm runs once per repeat, in turn with the others (A B A B ...), each time in a process of its own, with the same
number of threads. What came out is kept in bench/out/speed, a file per part, so that parts may be measured one by one.
An arm that would need more than ``--memory-gb`` is not run, and the tables say so. What is measured on:
bench/speed_cases.py; what an arm does: bench/speed_arms.py.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

import speed_arms
import speed_report
from speed_arms import MSHUB, NNUNET, NNUNET_STEP

if TYPE_CHECKING:
    from speed_cases import Case

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "out"
PARTS = ("export", "preprocessing", "request", "gpu", "server")
REAL_CT = ROOT.parent / "shared" / "data" / "ct_torso" / "example_ct.nii.gz"
SHARE_OF_MEMORY = 0.6
OWN_BYTES = {"export": 2**29, "request": 3 * 2**30, "gpu": 5 * 2**30, "server": 3 * 2**30}
"""What a process needs besides: libraries, and for a request the network and its layers' outputs."""
SERVED_PROFILE = "fast"
THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "nnUNet_def_n_proc",
)  # fmt: skip
UNUSED_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")  # nnU-Net complains where they are not set


@dataclass(frozen=True)
class Settings:
    """What was asked for."""

    repeats: int
    threads: int
    memory: int
    quick: bool
    mirroring: bool
    cold: bool
    only: str
    profiles: tuple[str, ...]
    real: Path | None
    out: Path


# -- arms -------------------------------------------------------------------------------------------------------------


def arms_of(case: Case, part: str, settings: Settings) -> list[Json]:
    """Return the arms of a case: the label is that of the arm ``reference``, times are beside those of ``beside``."""
    if part == "request":
        return list(_request_arms(case, settings))
    if part == "gpu":
        return list(_gpu_arms())
    if part == "server":
        return [{"name": f"POST /infer, profile {SERVED_PROFILE}", "program": MSHUB, "profile": SERVED_PROFILE}]
    return [{"name": name, "program": name, "reference": NNUNET, "beside": NNUNET} for name in (NNUNET, MSHUB)]


def _request_arms(case: Case, settings: Settings) -> Iterator[Json]:
    """Yield nnU-Net's ways and MSHub's, for every profile and all that can run its network; mirroring takes 8 times.

    The command line is for the profiles that do what nnU-Net does, with what runs the network by default.
    """
    from mshub.nnunet.predictor import PROFILES
    from speed_cases import STARTER

    both = settings.mirroring or (case.name == STARTER and not settings.quick)
    for mirroring in (False, True) if both else (False,):
        wanted = settings.profiles or tuple(PROFILES)
        profiles = [one for name, one in PROFILES.items() if one.mirroring == mirroring and name in wanted]
        more = ", mirroring" if mirroring else ""
        warm, cold = f"{NNUNET}, warm{more}", f"{NNUNET}, command line{more}"
        same = {"mirroring": mirroring, "reference": warm}
        yield {**same, "name": warm, "beside": warm, "program": NNUNET, "warm": True}
        for profile, runtime in itertools.product(profiles, _runtimes()):
            ours = {**same, "beside": warm, "program": MSHUB, "warm": True, "profile": profile.name, "runtime": runtime}
            yield {**ours, "name": f"{MSHUB}, warm, {profile.name}, {runtime}"}
        if case.name != STARTER and not settings.cold:
            continue
        yield {**same, "name": cold, "beside": cold, "program": NNUNET, "warm": False}
        for profile in (profile for profile in profiles if profile.step == NNUNET_STEP):
            ours = {**same, "beside": cold, "program": MSHUB, "warm": False, "profile": profile.name}
            yield {**ours, "name": f"{MSHUB}, command line, {profile.name}"}


def _gpu_arms() -> Iterator[Json]:
    """Yield what stays warm on a GPU and does what nnU-Net does by default."""
    warm = f"{NNUNET}, warm"
    same = {"mirroring": True, "reference": warm, "beside": warm, "warm": True, "device": "cuda"}
    yield {**same, "name": warm, "program": NNUNET}
    yield {**same, "name": f"{MSHUB}, warm, accurate", "program": MSHUB, "profile": "accurate", "runtime": "torch"}


def _runtimes() -> tuple[str, ...]:
    """Return what can run networks here; nnU-Net's own first."""
    from mshub.nnunet.openvino_library import is_installed

    return ("torch", "openvino") if is_installed() else ("torch",)


def too_large(case: Case, part: str, arm: Json, limit: int) -> Json | None:
    """Return why an arm cannot run within `limit` bytes, and what it needs beside the logits; None if it can."""
    from speed_cases import logits_bytes, nnunet_export_bytes

    if part == "preprocessing":
        return None
    logits = logits_bytes(case)
    extra = nnunet_export_bytes(case) - logits if arm["program"] == NNUNET else 0
    needs = OWN_BYTES[part] + logits + extra
    return {"skipped": f"not run: needs about {needs / 2**30:.0f} GB", "extra": extra} if needs > limit else None


# -- running ----------------------------------------------------------------------------------------------------------


def difference(part: str, reference: Path, result: Path) -> Json:
    """Return how far what an arm made is from the reference."""
    if part == "preprocessing":
        ours, theirs = (np.load(path, mmap_mode="r") for path in (result, reference))
        if ours.shape != theirs.shape:
            return {"differing": max(ours.size, theirs.size), "voxels": theirs.size}
        return {"largest_difference": float(np.abs(ours - theirs).max())}
    ours, theirs = (_label(path) for path in (result, reference))
    differing = np.count_nonzero(ours != theirs) if ours.shape == theirs.shape else theirs.size
    return {"differing": int(differing), "voxels": int(theirs.size), "foreground": float(np.mean(theirs != 0))}


def _label(path: Path) -> np.ndarray[Any, Any]:
    import nibabel as nib

    return np.load(path) if path.suffix == ".npy" else np.asarray(nib.load(path).dataobj)


class Measurement:
    """All arms of the cases of one part, and what they took, in a file that is complete after every run.

    Parameters
    ----------
    part : str
    settings : Settings
    command : str
        What was typed.
    """

    def __init__(self, part: str, settings: Settings, command: str) -> None:
        self._part, self._settings = part, settings
        self._file = settings.out / f"{part}.json"
        self._results: Json = {
            "part": part,
            "command": command,
            "date": datetime.date.today().isoformat(),
            "machine": speed_report.machine(gpu=part == "gpu"),
            "threads": settings.threads,
            "repeats": settings.repeats,
            "cases": [],
            "runs": [],
        }
        if settings.only and self._file.is_file():
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            self._results.update({key: kept[key] for key in ("command", "cases", "runs")})

    def measure(self, case: Case) -> None:
        """Run all arms of a case in turn; what was known of it is forgotten."""
        from speed_cases import prepare

        for key, name in (("cases", "name"), ("runs", "case")):
            self._results[key] = [one for one in self._results[key] if one[name] != case.name]
        scratch = self._settings.out / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            arms = arms_of(case, self._part, self._settings)
            arms = [arm for arm in arms if self._fits(case, arm)]
            task = prepare(case, scratch, self._settings.real) if arms else {}
            self._results["cases"].append({**case.facts(), "border": task.get("border")})
            self._write()
            for repeat in range(self._repeats_of(case)):
                for arm in arms:
                    self._run(case, {**task, "arm": arm}, repeat, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _repeats_of(self, case: Case) -> int:
        """Return how often arms run: once for a point of a curve, and for the server, which is asked several times."""
        return self._settings.repeats if case.in_table and self._part != "server" else 1

    def _fits(self, case: Case, arm: Json) -> bool:
        reason = too_large(case, self._part, arm, self._settings.memory)
        if reason is not None:
            self._keep(case, arm, 0, reason)
        return reason is None

    def _run(self, case: Case, task: Json, repeat: int, scratch: Path) -> None:
        arm = task["arm"]
        ending = ".npy" if self._part in ("export", "preprocessing") else ".nii.gz"
        result, reference = scratch / f"result{ending}", scratch / f"{arm.get('reference')}{ending}"
        more = {"part": self._part, "threads": self._settings.threads, "repeats": self._settings.repeats}
        found = speed_arms.run({**task, **more, "result": str(result)})
        if result.is_file():
            if arm["name"] == arm["reference"] and not reference.exists():
                result.replace(reference)
            elif reference.exists():
                found.update(difference(self._part, reference, result))
            result.unlink(missing_ok=True)
        self._keep(case, arm, repeat, found)

    def _keep(self, case: Case, arm: Json, repeat: int, found: Json) -> None:
        run = {"case": case.name, "arm": arm["name"], "beside": arm.get("beside"), "repeat": repeat, **found}
        self._results["runs"].append(run)
        self._write()
        seconds = [one["wall_s"] for one in found.get("requests", [found]) if "wall_s" in one]
        told = found.get("skipped") or found.get("failed") or ", ".join(f"{one:.2f} s" for one in seconds)
        print(f"{self._part} | {case.name} | {arm['name']} | {repeat + 1}: {told}", file=sys.stderr, flush=True)

    def _write(self) -> None:
        self._file.write_text(json.dumps(self._results, indent=1), encoding="utf-8")


def measure(parts: Sequence[str], settings: Settings, command: str) -> None:
    """Measure parts, and keep what came out."""
    from speed_cases import export_cases, gpu_cases, preprocessing_cases, request_cases

    for part in parts:
        measurement = Measurement(part, settings, command)
        cases = {
            "export": lambda: export_cases(settings.quick),
            "preprocessing": lambda: preprocessing_cases(settings.quick),
            "gpu": lambda: gpu_cases(settings.quick),
        }.get(part, lambda: request_cases(settings.quick, settings.real))()
        for case in cases:
            if settings.only in case.name:
                measurement.measure(case)


def same_for_all(settings: Settings) -> None:
    """Set the environment of all processes; before any of them imports a library."""
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(settings.threads)))
    os.environ.update(dict.fromkeys((*UNUSED_VARIABLES, "MSHUB_HOME"), str(settings.out / "scratch")))


# -- the command line -------------------------------------------------------------------------------------------------


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description="MSHub's predictions beside nnU-Net's own: time, memory, labels.")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all that there is but the server"
    )
    parser.add_argument("--server", action="store_true", help="measure the server too")
    parser.add_argument("--repeats", type=int, help="default: 5, with --quick 1")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--memory-gb", type=float, help="what an arm may need; default: 60 %% of the machine's")
    parser.add_argument("--mirroring", action="store_true", help="mirroring also for the organ model: 8 times as long")
    parser.add_argument("--cold", action="store_true", help="the command line also for the organ models")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases with these words; others keep their results")
    parser.add_argument("--profiles", nargs="+", default=(), metavar="PROFILE", help="of whole requests; default: all")
    parser.add_argument("--real", type=Path, nargs="?", const=REAL_CT, metavar="FILE", help="a CT for the organ model")
    parser.add_argument("--quick", action="store_true", help="small sizes, kept apart: a smoke test")
    parser.add_argument("--report-only", action="store_true", help="measure nothing, write the report again")
    parser.add_argument("--out", type=Path, help="folder of results; default: bench/out/speed")
    parser.add_argument("--doc", type=Path, help="file with the markers; default: docs/performance.md")
    found = parser.parse_args(arguments)
    unknown = [part for part in found.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]}; expected some of {', '.join(PARTS)}")
    if found.real is not None and not (found.real.is_file() and found.real.name.endswith(".nii.gz")):
        parser.error(f"--real: found {found.real.name}, expected a CT, an existing file .nii.gz")
    wanted = found.parts or [*PARTS[:3], *["gpu"] * _has_gpu(), *["server"] * found.server]
    found.parts = [part for part in PARTS if part in wanted]
    found.out = found.out or OUT / ("speed-quick" if found.quick else "speed")
    found.doc = found.doc or (found.out if found.quick else ROOT / "docs") / "performance.md"
    return found


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def command_of(arguments: Sequence[str]) -> str:
    """Return what was typed, without folders of this machine."""
    told = [Path(argument).name if Path(argument).is_absolute() else argument for argument in arguments]
    return shlex.join(["python", "bench/speed.py", *told])


def main() -> None:
    """Run the command line."""
    arguments = parsed()
    memory = int(
        arguments.memory_gb * 2**30 if arguments.memory_gb else SHARE_OF_MEMORY * psutil.virtual_memory().total
    )
    settings = Settings(
        repeats=arguments.repeats or (1 if arguments.quick else 5),
        threads=arguments.threads,
        memory=memory,
        quick=arguments.quick,
        mirroring=arguments.mirroring,
        cold=arguments.cold,
        only=arguments.only,
        profiles=tuple(arguments.profiles),
        real=arguments.real,
        out=arguments.out.resolve(),
    )
    same_for_all(settings)
    if not arguments.report_only:
        measure(arguments.parts, settings, command_of(sys.argv[1:]))
    speed_report.write(settings.out, arguments.doc)
    if failures := speed_report.failures(settings.out):
        raise SystemExit("These failed, what they said is above:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
