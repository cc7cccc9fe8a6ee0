"""OHIF in a real Chromium, driven as a radiologist would: by what is on the screen."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from playwright.sync_api import ConsoleMessage, Page, Request, Response, Route, sync_playwright

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = (
    "--no-sandbox",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
)
WINDOW = {"width": 1600, "height": 1000}
TIMEOUT_MS = 60_000
LONG_MS = 600_000
SETTLE_MS = 300

# Every slice of the active labelmap, with its position: read from the viewer's cache, not through MSHub's own code.
READ_LABELMAP = """() => {
  const { segmentationService, viewportGridService } = window.services;
  const active = segmentationService.getActiveSegmentation(viewportGridService.getActiveViewportId());
  if (!active) return null;
  const { imageIds, volumeId } = active.representationData.Labelmap;
  const ids = imageIds ?? window.cornerstone.cache.getVolume(volumeId).imageIds;
  const slices = ids.map(id => {
    const image = window.cornerstone.cache.getImage(id);
    const plane = window.cornerstone.metaData.get('imagePlaneModule', image.referencedImageId);
    let text = '';
    for (const value of image.voxelManager.getScalarData()) text += String.fromCharCode(value);
    return { position: [...plane.imagePositionPatient], row: [...plane.rowCosines], column: [...plane.columnCosines],
             columns: plane.columns, rows: plane.rows, voxels: btoa(text) };
  });
  const segments = Object.values(active.segments).filter(Boolean);
  return { id: active.segmentationId, label: active.label, slices,
           names: Object.fromEntries(segments.map(s => [s.label, s.segmentIndex])) };
}"""


class OhifBrowser:
    """One browser tab with OHIF; a context manager.

    Parameters
    ----------
    url : str
        Of the server, without a slash at the end.
    screenshots : Path, optional
        Folder for `screenshot`.

    Attributes
    ----------
    page : playwright Page
    problems : list of str
        Errors of the page, and answers of the server that were errors.
    foreign : list of str
        Addresses on other servers that the page asked for.
    """

    def __init__(self, url: str, screenshots: Path | None = None) -> None:
        self.url, self._screenshots = url, screenshots
        self.problems: list[str] = []
        self.foreign: list[str] = []

    def __enter__(self) -> OhifBrowser:
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        context = self._browser.new_context(viewport=WINDOW)  # type: ignore[arg-type]
        self.page: Page = context.new_page()
        self.page.set_default_timeout(TIMEOUT_MS)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._note_console)
        self.page.on("request", self._note_request)
        self.page.on("response", self._note_response)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error and self._screenshots:
            self.screenshot("failed")
        self._browser.close()
        self._playwright.stop()

    def _note_console(self, message: ConsoleMessage) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.problems.append(message.text)

    def _note_request(self, request: Request) -> None:
        if not request.url.startswith((self.url, "blob:", "data:", "about:")):
            self.foreign.append(request.url)

    def _note_response(self, response: Response) -> None:
        if response.status >= 400:
            self.problems.append(f"{response.status} {response.request.method} {response.url}")

    # -- looking ----------------------------------------------------------------------------------------------------

    def control(self, name: str) -> Any:
        """Return one of MSHub's controls by its name, such as ``run``; see the table in apps/mshub/ohif/README.md."""
        return self.page.locator(f'[data-cy="mshub-{name}"]')

    def text(self, name: str) -> str:
        """Return what one of MSHub's controls says, once it is there."""
        return str(self.control(name).inner_text())

    def screenshot(self, name: str) -> None:
        """Keep what is on the screen; nothing without a folder for it."""
        if self._screenshots:
            self._screenshots.mkdir(parents=True, exist_ok=True)
            self.page.wait_for_timeout(SETTLE_MS)
            self.page.screenshot(path=self._screenshots / f"{name}.png")

    def labelmap(self) -> tuple[NDArray[np.uint8], dict[str, int]]:
        """Return the segmentation on the screen, [x, y, slice] with slices along the normal, and its names."""
        found = self.page.evaluate(READ_LABELMAP)
        if found is None:
            raise LookupError("no segmentation is active in the viewer; run `segment` first")
        normal = np.cross(found["slices"][0]["row"], found["slices"][0]["column"])
        slices = sorted(found["slices"], key=lambda slice_: float(np.dot(normal, slice_["position"])))
        planes = [
            np.frombuffer(base64.b64decode(slice_["voxels"]), np.uint8).reshape(slice_["rows"], slice_["columns"])
            for slice_ in slices
        ]
        return np.stack(planes).transpose(2, 1, 0), found["names"]

    def active_slice(self) -> int:
        """Return the index, along the normal, of the slice in the active viewport."""
        return int(
            self.page.evaluate(
                """() => {
                  const { viewportGridService, cornerstoneViewportService, displaySetService } = window.services;
                  const id = viewportGridService.getActiveViewportId();
                  const uid = viewportGridService.getDisplaySetsUIDsForViewport(id)[0];
                  const ids = displaySetService.getDisplaySetByUID(uid).imageIds;
                  const plane = imageId => window.cornerstone.metaData.get('imagePlaneModule', imageId);
                  const { rowCosines: r, columnCosines: c } = plane(ids[0]);
                  const n = [r[1]*c[2] - r[2]*c[1], r[2]*c[0] - r[0]*c[2], r[0]*c[1] - r[1]*c[0]];
                  const height = imageId => plane(imageId).imagePositionPatient.reduce((s, v, i) => s + v * n[i], 0);
                  const shown = cornerstoneViewportService.getCornerstoneViewport(id).getCurrentImageId();
                  return ids.filter(imageId => height(imageId) < height(shown)).length;
                }"""
            )
        )

    # -- doing ------------------------------------------------------------------------------------------------------

    def open_list(self) -> None:
        """Open the study list."""
        self.page.goto(f"{self.url}/viewer/")
        self.page.locator("table, [data-cy^='studyRow']").first.wait_for()

    def open_study(self, patient: str) -> None:
        """Choose a patient in the study list and open the study in the MSHub mode."""
        self.page.get_by_text(patient, exact=True).first.click()
        self.page.get_by_role("button", name="MSHub", exact=True).click()
        self.wait_for_image()

    def open_mode(self, study: str, series: str = "") -> None:
        """Open a study in the MSHub mode by its address."""
        query = f"StudyInstanceUIDs={study}" + (f"&initialSeriesInstanceUID={series}" if series else "")
        self.page.goto(f"{self.url}/viewer/mshub?{query}")
        self.wait_for_image()

    def wait_for_image(self) -> None:
        """Wait until the image is drawn and the panel knows its series."""
        self.control("series").wait_for()
        self.page.wait_for_function(
            """() => {
              const id = window.services.viewportGridService.getActiveViewportId();
              const viewport = window.services.cornerstoneViewportService.getCornerstoneViewport(id);
              const imageId = viewport?.getCurrentImageId?.();
              return imageId && window.cornerstone.cache.getImage(imageId);
            }"""
        )
        self.page.wait_for_timeout(SETTLE_MS)

    def segment(self, model: str | None = None, shot: str | None = None) -> str:
        """Run a model, the chosen one if none is named, and wait for its result; return what the panel says of it."""
        if model:
            self.control(f"model-{model}").check()
        self.control("run").click()
        if shot:
            self.control("progress").wait_for()
            self.page.wait_for_timeout(1500)
            self.screenshot(shot)
        self.control("result").wait_for(timeout=LONG_MS)
        self.page.wait_for_timeout(SETTLE_MS)
        return self.text("result")

    def show_planes(self) -> None:
        """Show three planes through the volume, and wait until the segmentation is drawn in each."""
        self.page.locator('[data-cy="Layout"]').click()
        self.page.get_by_text("MPR", exact=True).first.click()
        self.page.wait_for_function(
            """() => {
              const { viewportGridService, cornerstoneViewportService } = window.services;
              const ids = [...viewportGridService.getState().viewports.keys()];
              const actors = id => cornerstoneViewportService.getCornerstoneViewport(id)?.getActors?.() ?? [];
              return ids.length === 3 && ids.every(id => actors(id).some(actor => actor.representationUID));
            }"""
        )
        self.page.wait_for_timeout(SETTLE_MS)

    def choose_segment(self, name: str) -> None:
        """Make one segment the one that is drawn."""
        self.page.evaluate(
            """name => {
              const { segmentationService, viewportGridService } = window.services;
              const active = segmentationService.getActiveSegmentation(viewportGridService.getActiveViewportId());
              const segment = Object.values(active.segments).find(segment => segment?.label === name);
              segmentationService.setActiveSegment(active.segmentationId, segment.segmentIndex);
            }""",
            name,
        )

    def brush(self, segment: str, radius_mm: float = 8, at: tuple[float, float] = (0.5, 0.5)) -> None:
        """Draw a short stroke of one segment; `at` is where it starts, as parts of the viewport's width and height."""
        self.choose_segment(segment)
        self._stroke("Brush", radius_mm, at)

    def erase(self, radius_mm: float = 8, at: tuple[float, float] = (0.5, 0.5)) -> None:
        """Erase along a short stroke."""
        self._stroke("Eraser", radius_mm, at)

    def _stroke(self, tool: str, radius_mm: float, at: tuple[float, float]) -> None:
        self.page.locator(f'[data-cy="{tool}"]').first.click()
        self.page.evaluate("value => window.commandsManager.run('setBrushSize', { value })", radius_mm)
        box = self.page.locator(".cornerstone-canvas").first.bounding_box()
        if box is None:
            raise LookupError("no viewport is on the screen")
        x, y = box["x"] + at[0] * box["width"], box["y"] + at[1] * box["height"]
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + 30, y + 10, steps=6)
        self.page.mouse.up()
        self.page.wait_for_timeout(SETTLE_MS)

    def submit(self, reviewer: str = "") -> str:
        """Submit the segmentation on the screen; return what the panel says of it."""
        if reviewer:
            self.control("reviewer").fill(reviewer)
        self.control("submit").click()
        self.control("submitted").wait_for(timeout=LONG_MS)
        return self.text("submitted")

    def next_case(self, strategy: str | None = None) -> str:
        """Ask for the next case and wait until it is open; return why it was chosen."""
        if strategy:
            self.control("strategy").select_option(strategy)
        self.control("next").click()
        self.control("why").wait_for()
        self.wait_for_image()
        return self.text("why")

    def train_with(self, options: dict[str, Any]) -> None:
        """Let the trainings this page asks for have `options` too, such as fewer epochs than a clinic would take."""

        def add(route: Route) -> None:
            asked = json.loads(route.request.post_data or "{}")
            route.continue_(post_data=json.dumps({**asked, **options}))

        self.page.route("**/train/*", add)

    def fine_tune(self, shot: str | None = None) -> str:
        """Fine-tune the chosen model and wait for the verdict; return what the panel says of it."""
        self.control("train").click()
        self.control("training").wait_for()
        if shot:
            self.page.wait_for_timeout(4000)
            self.screenshot(shot)
        self.control("trained").wait_for(timeout=LONG_MS)
        return self.text("trained")
