"""Tables and plots of what bench/speed.py measured, from its files alone."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Json = dict[str, Any]

BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
NNUNET, MSHUB = "nnunetv2", "mshub"
STAGES = {
    "read": "#8a939c",
    "load": "#5b6875",
    "preprocess": "#2a9d8f",
    "network": "#1f5fa8",
    "measure": "#7b4fb0",
    "export": "#d9822b",
    "write": "#e8c547",
}
COLOURS = {NNUNET: "#d9822b", MSHUB: "#1f5fa8"}
CURVES = {"slices": "{0} of {y} x {x}, {heads} classes", "classes": "{0}, {z} slices of {y} x {x}"}
PACKAGES = ("torch", "nnunetv2", "openvino", "numpy", "scipy", "scikit-image", "numba")
MB = 1e6
NOTHING = ""


def machine(*, gpu: bool = False) -> Json:
    """Return what the numbers depend on: processor, memory, versions, and the GPU if it is that which is measured."""
    return {
        "processor": f"{_gpu()}, {_processor()}" if gpu else _processor(),
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "system": f"{platform.system()}, Python {platform.python_version()}",
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", information.read_text()) if information.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def _gpu() -> str:
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "no GPU"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- what was measured ------------------------------------------------------------------------------------------------


class Part:
    """The results of one part.

    Parameters
    ----------
    file : Path
        As `speed.Measurement` wrote it.
    """

    def __init__(self, file: Path) -> None:
        self._content: Json = json.loads(file.read_text(encoding="utf-8"))
        self.name: str = self._content["part"]
        self.cases: list[Json] = self._content["cases"]

    def runs(self, case: str, arm: str) -> list[Json]:
        """Return the runs of an arm, in their order."""
        return [run for run in self._content["runs"] if (run["case"], run["arm"]) == (case, arm)]

    def arms(self, case: str) -> list[str]:
        """Return the arms of a case, in their order."""
        return list(dict.fromkeys(run["arm"] for run in self._content["runs"] if run["case"] == case))

    def values(self, case: str, arm: str, quantity: Callable[[Json], float | None]) -> list[float]:
        """Return a quantity of every run that has it."""
        done = (run for run in self.runs(case, arm) if "skipped" not in run and "failed" not in run)
        return [value for run in done if (value := quantity(run)) is not None]

    def trouble(self, case: str, arm: str) -> str:
        """Return why an arm has no numbers, an empty string if it has some."""
        runs = self.runs(case, arm)
        reasons = [run.get("skipped") or f"failed: {run['failed']}" for run in runs if {"skipped", "failed"} & {*run}]
        return reasons[0] if len(reasons) == len(runs) and reasons else ""

    def _repeats(self) -> str:
        """Say how often arms ran; the server's is asked several times in one run."""
        done: Counter[tuple[str, str]] = Counter()
        for run in self._content["runs"]:
            done[run["case"], run["arm"]] += len(run["requests"]) if "requests" in run else "wall_s" in run
        done = +done  # without those that never ran
        counts = sorted({*done.values()} or {self._content["repeats"]})
        return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"

    def origin(self) -> str:
        """Say where, when and how."""
        machine = self._content["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        return (
            f"`{self._content['command']}`, {self._content['date']}: {machine['processor']}, {machine['cores']} cores, "
            f"{machine['memory'] / 2**30:.0f} GiB; {self._content['threads']} threads, median (smallest to largest) of "
            f"{self._repeats()}. {machine['system']}, {versions}.\n"
        )


def wall(run: Json) -> float:
    """Wall seconds."""
    return float(run["wall_s"])


def cpu(run: Json) -> float:
    """Processor seconds."""
    return float(run["cpu_s"])


def peak(run: Json) -> float:
    """Largest resident memory, MB."""
    return float(run["peak"]) / MB


def extra(run: Json) -> float:
    """Largest resident memory above that before, MB."""
    return float(run["peak"] - run["baseline"]) / MB


def gpu_peak(run: Json) -> float | None:
    """Largest memory of a GPU that arrays had, MB."""
    return run["gpu_peak"] / MB if "gpu_peak" in run else None


def floor(run: Json) -> float | None:
    """Seconds the arithmetic of the network takes at least."""
    return run.get("floor_s")


def again(run: Json) -> float | None:
    """Wall seconds of a second request for the same image."""
    return float(run["second"]["wall_s"]) if "second" in run else None


# -- words ------------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Write a number with three digits, at least."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3
    return f"{value:,.{digits}f}"


def spread(values: Sequence[float]) -> str:
    """Write the median, and the range where there is one."""
    if not values:
        return NOTHING
    middle = number(statistics.median(values))
    return f"{middle} ({number(min(values))} to {number(max(values))})" if len(values) > 1 else middle


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> str:
    """Write how many times the median of `theirs` is that of `ours`."""
    if not theirs or not ours or statistics.median(ours) <= 0:
        return NOTHING
    return f"**{statistics.median(theirs) / statistics.median(ours):,.1f}x**"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def grid(shape: Sequence[int], spacing: Sequence[float]) -> str:
    """Write a grid as people do, x first."""
    voxels = " x ".join(str(edge) for edge in reversed(shape))
    return f"{voxels} at {' x '.join(f'{edge:g}' for edge in reversed(spacing))} mm"


def _difference(part: Part, case: str, arm: str) -> str:
    """Write by how much what an arm made differs from the reference, the most of all runs."""
    differing = part.values(case, arm, lambda run: run.get("differing"))
    if differing:
        voxels = part.values(case, arm, lambda run: run.get("voxels"))[0]
        share = f" ({max(differing) / voxels:.2%})" if max(differing) else ""
        return f"{max(differing):,.0f}{share}"
    largest = part.values(case, arm, lambda run: run.get("largest_difference"))
    return f"{max(largest):.2g}" if largest else NOTHING


# -- tables -----------------------------------------------------------------------------------------------------------


def pair_table(part: Part, cases: Sequence[Json], difference: str) -> str:
    """Return nnU-Net and MSHub side by side, a row per case."""
    quantities = {"wall s": wall, "CPU s": cpu, "more memory, MB": extra}
    head = ["case", "image", "network"]
    for name in quantities:
        head += [f"{name}: nnunetv2", "MSHub", NOTHING]
    return table([*head, difference], (_pair_row(part, case, quantities.values()) for case in cases))


def _pair_row(part: Part, case: Json, quantities: Iterable[Callable[[Json], float]]) -> list[str]:
    name, geometry = case["name"], case["geometry"]
    surface = f", {case['border']:.1%} at a surface" if case.get("border") is not None else ""
    row = [name, grid(geometry["shape"], geometry["spacing"])]
    row.append(grid(case["network_shape"], geometry["network_spacing"]) + surface)
    for quantity in quantities:
        theirs, ours = (part.values(name, arm, quantity) for arm in (NNUNET, MSHUB))
        row.append(spread(theirs) or part.trouble(name, NNUNET))
        row += [spread(ours) or part.trouble(name, MSHUB), ratio(theirs, ours)]
    return [*row, _difference(part, name, MSHUB)]


def request_table(part: Part, case: Json) -> str:
    """Return all arms of a whole request; ratios are to nnU-Net, warm or not, with mirroring or not, as the arm is."""
    name, rows = case["name"], []
    others: dict[str, Callable[[Json], float | None]] = {
        "peak MB": peak, "above the baseline": extra, "second request, wall s": again
    }  # fmt: skip
    if part.name == "gpu":
        others |= {"peak MB of the GPU": gpu_peak, "arithmetic alone, s": floor}
    for arm in part.arms(name):
        beside = part.runs(name, arm)[0]["beside"]
        row = [arm]
        for quantity in (wall, cpu):
            values = part.values(name, arm, quantity)
            theirs = part.values(name, beside, quantity) if arm != beside else []
            row += [spread(values) or part.trouble(name, arm), ratio(theirs, values)]
        row += [spread(part.values(name, arm, quantity)) for quantity in others.values()]
        rows.append([*row, _difference(part, name, arm)])
    return table(["arm", "wall s", NOTHING, "CPU s", NOTHING, *others, "differing voxels"], rows)


def _foreground(part: Part, case: str) -> str:
    """Say what share of the voxels structures have."""
    shares = [share for arm in part.arms(case) for share in part.values(case, arm, lambda run: run.get("foreground"))]
    return f", structures {shares[0]:.0%}" if shares else ""


def stage_table(part: Part, case: Json) -> str:
    """Return seconds and peak of each stage of the arms that tell them."""
    arms = [arm for arm in part.arms(case["name"]) if _stages(part, case["name"], arm)]
    told = {arm: _stages(part, case["name"], arm) for arm in arms}
    used = [stage for stage in STAGES if any(stage in stages for stages in told.values())]
    rows = []
    for arm, stages in told.items():
        row = [arm]
        for stage in used:
            seconds, most = stages.get(stage, (None, None))
            memory = f", {number(most)} MB" if most is not None else ""
            row.append(f"{number(seconds)} s{memory}" if seconds is not None else NOTHING)
        rows.append(row)
    return table(["arm", *used], rows)


def _stages(part: Part, case: str, arm: str) -> dict[str, tuple[float, float | None]]:
    """Return stage -> median seconds and MB."""
    runs = [run["stages"] for run in part.runs(case, arm) if run.get("stages")]
    told = {}
    for stage in dict.fromkeys(stage for stages in runs for stage in stages):
        ones = [stages[stage] for stages in runs if stage in stages]
        peaks = [one["peak"] / MB for one in ones if one["peak"] is not None]
        told[stage] = (statistics.median(one["wall_s"] for one in ones), statistics.median(peaks) if peaks else None)
    return told


def server_table(part: Part) -> str:
    """Return the time of requests to the server beside what the predictor says it took."""
    rows = []
    for case in part.cases:
        for arm in part.arms(case["name"]):
            posts = [post for run in part.runs(case["name"], arm) for post in run.get("requests", ())]
            if not posts:
                rows.append([case["name"], arm, part.trouble(case["name"], arm), NOTHING, NOTHING])
                continue
            walls, told = ([post[key] for post in posts] for key in ("wall_s", "told_s"))
            over = [100 * (post["wall_s"] / post["told_s"] - 1) for post in posts]
            rows.append([case["name"], arm, spread(walls), spread(told), f"{statistics.median(over):+.1f} %"])
    return table(["case", "request", "wall s", "of which the prediction", "overhead"], rows)


# -- plots ------------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def draw_growth(part: Part, path: Path) -> None:
    """Draw time and memory of the export over the size of the image and the number of classes."""
    figure = _figure(10, 7)
    panels = figure.subplots(2, len(CURVES), squeeze=False)
    for column, curve in enumerate(CURVES):
        points = [case for case in part.cases if curve in case["curves"]]
        sizes = {case["name"]: case["geometry"]["shape"][0] if curve == "slices" else case["heads"] for case in points}
        _draw_curves(panels[0][column], part, sizes, wall, "wall time, s")
        _draw_curves(panels[1][column], part, sizes, extra, "memory above the baseline, MB")
        panels[0][column].set_title(f"export over {curve}", fontsize=10)
        panels[1][column].set_xlabel(_axis(curve, points))
    handles = {
        label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def _axis(curve: str, points: Sequence[Json]) -> str:
    """Say what grows along a curve, and what stays as it is."""
    if not points:
        return curve
    z, y, x = points[0]["geometry"]["shape"]
    return CURVES[curve].format(curve, z=z, y=y, x=x, heads=points[0]["heads"])


def _draw_curves(axes: Axes, part: Part, sizes: dict[str, int], quantity: Callable[[Json], float], label: str) -> None:
    for arm, colour in COLOURS.items():
        ordered = sorted(sizes.items(), key=lambda item: item[1])
        measured = [(size, values) for case, size in ordered if (values := part.values(case, arm, quantity))]
        if measured:
            middles = [statistics.median(values) for _, values in measured]
            around = zip(middles, (values for _, values in measured), strict=True)
            errors = [(middle - min(values), max(values) - middle) for middle, values in around]
            axes.errorbar(
                [size for size, _ in measured], middles, yerr=[*zip(*errors, strict=True)], fmt="o-", color=colour,
                capsize=3, label=arm,
            )  # fmt: skip
        needs = [
            (size, run["extra"] / MB) for case, size in ordered for run in part.runs(case, arm) if run.get("extra")
        ]
        if needs and quantity is extra:
            axes.plot(
                *zip(*needs, strict=True),
                "o--",
                color=colour,
                fillstyle="none",
                label=f"{arm}, not run: what it would need",
            )
    axes.set(xscale="log", yscale="log", ylabel=label)
    ticks = sorted(set(sizes.values()))
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def draw_stages(part: Part, path: Path) -> None:
    """Draw the stages of every arm that tells them, stacked, a panel per case."""
    told = {
        case["name"]: {arm: stages for arm in part.arms(case["name"]) if (stages := _stages(part, case["name"], arm))}
        for case in part.cases
    }
    told = {case: arms for case, arms in told.items() if arms}
    if not told:
        return
    lengths = [len(arms) for arms in told.values()]
    figure = _figure(9, 1.2 + 0.45 * sum(lengths) + 0.6 * len(lengths))
    panels = figure.subplots(len(told), 1, squeeze=False, height_ratios=lengths)[:, 0]
    for axes, (case, arms) in zip(panels, told.items(), strict=True):
        for row, stages in enumerate(arms.values()):
            left = 0.0
            for stage, colour in STAGES.items():
                seconds = stages.get(stage, (0.0, None))[0]
                axes.barh(row, seconds, left=left, color=colour, label=stage if row == 0 else None)
                left += seconds
            axes.text(left, row, f" {number(left)} s", va="center", fontsize=8)
        axes.set_yticks(range(len(arms)), list(arms), fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(case, fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("wall time, s", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


# -- the page ---------------------------------------------------------------------------------------------------------


def export_section(part: Part, images: Path) -> str:
    """Return the section on the export, and draw its plot."""
    draw_growth(part, images / "performance-growth.png")
    rows = [case for case in part.cases if case["in_table"]]
    points = [case for case in part.cases if case["curves"]]
    return "\n".join(
        [
            "### Export: from the network's output to the label\n",
            part.origin(),
            pair_table(part, rows, "differing voxels"),
            f"![Growth of time and memory]({images.name}/performance-growth.png)\n",
            "The points of the curves, one run each:\n",
            pair_table(part, points, "differing voxels"),
        ]
    )


def preprocessing_section(part: Part, _: Path) -> str:
    """Return the section on preprocessing."""
    return "\n".join(["### Preprocessing\n", part.origin(), pair_table(part, part.cases, "largest difference")])


def request_section(part: Part, images: Path) -> str:
    """Return the section on whole requests, on the CPU or on a GPU, and draw its plot."""
    title, plot = REQUESTS[part.name]
    draw_stages(part, images / plot)
    lines = [f"### {title}\n", part.origin()]
    for case in part.cases:
        geometry = case["geometry"]
        network = grid(case["network_shape"], geometry["network_spacing"])
        where = f"{grid(geometry['shape'], geometry['spacing'])}, network {network}{_foreground(part, case['name'])}"
        lines += [f"**{case['name']}** ({where})\n", request_table(part, case), stage_table(part, case)]
    return "\n".join([*lines, f"![Time of each stage]({images.name}/{plot})\n"])


def server_section(part: Part, _: Path) -> str:
    """Return the section on the server."""
    return "\n".join(["### The server\n", part.origin(), server_table(part)])


REQUESTS = {
    "request": ("Whole requests", "performance-stages.png"),
    "gpu": ("Whole requests on a GPU", "performance-gpu.png"),
}
SECTIONS = {
    "export": export_section,
    "preprocessing": preprocessing_section,
    "request": request_section,
    "gpu": request_section,
    "server": server_section,
}


def parts_in(out: Path) -> dict[str, Part]:
    """Return the parts that were measured, by name."""
    files = {name: out / f"{name}.json" for name in SECTIONS}
    return {name: Part(file) for name, file in files.items() if file.is_file()}


def failures(out: Path) -> list[str]:
    """Return a line for every arm that has no numbers because it failed."""
    return [
        f"{part.name} | {case['name']} | {arm}: {trouble}"
        for part in parts_in(out).values()
        for case in part.cases
        for arm in part.arms(case["name"])
        if (trouble := part.trouble(case["name"], arm)).startswith("failed")
    ]


def render(out: Path, images: Path) -> str:
    """Draw the plots and return the tables of all parts that were measured."""
    found = parts_in(out)
    if not found:
        raise SystemExit(f"{out.name}/ holds no results; run bench/speed.py without --report-only first.")
    images.mkdir(parents=True, exist_ok=True)
    return "\n".join(SECTIONS[name](part, images) for name, part in found.items())


def replaced(text: str, tables: str) -> str:
    """Return a page with what is between its markers replaced.

    Raises
    ------
    ValueError
        Not one begin and one end, in this order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"expected {BEGIN} and {END} once each, in this order; put them where the tables belong")
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def write(out: Path, page: Path) -> None:
    """Write tables and plots of the results in `out` into `page`, and ``images`` beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    text = page.read_text(encoding="utf-8") if page.is_file() else f"# Performance\n\n{BEGIN}\n{END}\n"
    page.write_text(replaced(text, render(out, page.parent / "images")), encoding="utf-8")
