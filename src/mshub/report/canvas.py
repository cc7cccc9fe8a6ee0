"""Draws one slice with its contours, true to its proportions, as PNG."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from mshub.geometry import Array

#: Contours: apart for colour-blind readers too, and none of them a grey of the image.
REVIEWED, BEFORE, AFTER, DIFFERENT = "#f5d90a", "#4cc9f0", "#ff6ec7", "#ff3b30"

#: Longer side of a slice's picture; the page shows it at half the size, so that it is sharp on paper.
PANEL_PIXELS, PANEL_DPI = 660, 100

_WRITING: dict[str, Any] = {
    "color": "white",
    "fontsize": 14,
    "fontweight": "bold",
    "path_effects": [withStroke(linewidth=3, foreground="black")],
}


@dataclass(frozen=True)
class Box:
    """Part of a slice, in pixels from its top left corner."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True, eq=False)
class Canvas:
    """Draws one slice, and the part of it in `box`, true to its proportions."""

    image: Array
    window: tuple[float, float]
    pixel_mm: tuple[float, float]
    sides: tuple[str, str, str, str]
    box: Box

    def overview(self) -> str:
        """Return the whole slice as a PNG, with a frame around the part that `detail` shows."""
        whole = Box(0, 0, self.image.shape[1], self.image.shape[0])
        figure, axes = self._draw(whole)
        if self.box.width < 0.95 * whole.width:
            corner = (self.box.left - 0.5, self.box.top - 0.5)
            axes.add_patch(Rectangle(corner, self.box.width, self.box.height, fill=False, edgecolor="white",
                                     linestyle="--", linewidth=1.2))  # fmt: skip
        return _png(figure)

    def detail(self, reviewed: Array, predicted: Array, colour: str) -> str:
        """Return the part in the box as a PNG, the predicted contours over the reviewed ones."""
        figure, axes = self._draw(self.box)
        shade = np.zeros((*reviewed.shape, 4))
        shade[reviewed != predicted] = to_rgba(DIFFERENT, 0.35)
        axes.imshow(shade, aspect="auto", interpolation="nearest")
        axes.add_collection(LineCollection(_outline(reviewed), colors=REVIEWED, linewidths=3.6, capstyle="projecting"))
        axes.add_collection(LineCollection(_outline(predicted), colors=colour, linewidths=2.2, capstyle="projecting"))
        return _png(figure)

    def _draw(self, box: Box) -> tuple[Figure, Axes]:
        """Return a figure of the part's true proportions, filled by axes with the image and its sides."""
        height_mm, width_mm = box.height * self.pixel_mm[0], box.width * self.pixel_mm[1]
        scale = PANEL_PIXELS / max(height_mm, width_mm) / PANEL_DPI
        figure = Figure(figsize=(width_mm * scale, height_mm * scale), dpi=PANEL_DPI)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        low, high = self.window
        axes.imshow(self.image, cmap="gray", vmin=low, vmax=high, aspect="auto", interpolation="bilinear")
        axes.set_xlim(box.left - 0.5, box.left + box.width - 0.5)
        axes.set_ylim(box.top + box.height - 0.5, box.top - 0.5)
        self._mark_sides(axes)
        self._mark_length(axes, width_mm)
        return figure, axes

    def _mark_sides(self, axes: Axes) -> None:
        places = [(0.015, 0.5, "left", "center"), (0.985, 0.5, "right", "center"),
                  (0.5, 0.985, "center", "top"), (0.5, 0.015, "center", "bottom")]  # fmt: skip
        for side, (x, y, horizontal, vertical) in zip(self.sides, places, strict=True):
            axes.text(x, y, side, transform=axes.transAxes, ha=horizontal, va=vertical, **_WRITING)

    def _mark_length(self, axes: Axes, width_mm: float) -> None:
        """Draw a bar of a round length, about a fifth of the picture."""
        length = max((step for step in (1, 2, 5, 10, 20, 50, 100) if step <= width_mm / 4), default=0)
        if length:
            end = 0.03 + length / width_mm
            axes.plot([0.03, end], [0.035, 0.035], transform=axes.transAxes, color="white", linewidth=2.5)
            axes.text(0.03, 0.05, f"{length} mm", transform=axes.transAxes, va="bottom", **{**_WRITING, "fontsize": 11})


def _outline(labels: Array) -> list[Array]:
    """Return the voxel edges between different values, each with shape (2 ends, x and y): exact, not smoothed."""
    framed = np.pad(labels, 1)
    rows, columns = np.nonzero(framed[1:-1, 1:] != framed[1:-1, :-1])
    upright = [[columns - 0.5, rows - 0.5], [columns - 0.5, rows + 0.5]]
    lower, across = np.nonzero(framed[1:, 1:-1] != framed[:-1, 1:-1])
    level = [[across - 0.5, lower - 0.5], [across + 0.5, lower - 0.5]]
    return [edge for ends in (upright, level) for edge in np.moveaxis(np.array(ends, dtype=float), 2, 0)]


def _png(figure: Figure) -> str:
    """Return a figure as a data URI; it says nothing of who made it."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi="figure", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
