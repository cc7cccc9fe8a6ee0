"""What bench/speed.py measures: each arm is a function that does one thing once, in a process of its own.

Processes are forked from a server of Python's own that has imported the libraries and done nothing else: importing them
takes ten seconds. A task is a dict: what `speed_cases.prepare` returned, and ``part``, ``arm`` (a dict), ``threads``,
``repeats`` and ``result``, where the label or array goes. Arms that stay warm do the same on something tiny first.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from speed_meter import Meter

Array = np.ndarray[Any, Any]
Json = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
NNUNET, MSHUB = "nnunetv2", "mshub"
NNUNET_STEP = 0.5
NNUNET_MAIN = (
    "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder;"
    "predict_entry_point_modelfolder()"
)
LIBRARIES = ("mshub.nnunet.predictor", "mshub.volume_io", "matplotlib.figure", "psutil")
"""What the server of processes imports before."""
TINY_SLICES, TINY_EDGE = 4, 24
CONFIGURATION = "3d_fullres"


def run(task: Json) -> Json:
    """Do a task in a process of its own; ``failed`` says why it did not come to an end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*LIBRARIES])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(task, sender))
    process.start()
    sender.close()
    try:
        found: Json = receiver.recv()
    except EOFError:
        found = {"failed": "the process ended without an answer"}
    process.join()
    if process.exitcode is not None and process.exitcode < 0:
        return {"failed": f"ended by {signal.Signals(-process.exitcode).name}"}
    return found


def _answer(task: Json, sender: Connection) -> None:
    try:
        found = work(task)
    except Exception as error:
        traceback.print_exc()
        found = {"failed": type(error).__name__}  # what it says may name folders of this machine
    sender.send(found)


def work(task: Json) -> Json:
    """Do a task in this process and return what it took."""
    arm: Callable[[Json], Json] = {
        "export": _export,
        "preprocessing": _preprocessing,
        "request": _request,
        "gpu": _request,
        "server": _server,
    }[task["part"]]
    with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net prints
        return arm(task)


# -- export -----------------------------------------------------------------------------------------------------------


def _export(task: Json) -> Json:
    logits = np.load(task["logits"])
    properties = _properties(task["properties"])
    label_of = (_nnunet_export if task["arm"]["program"] == NNUNET else _mshub_export)(task)
    label_of(*_tiny_export(logits, properties))
    with Meter() as meter:
        label = label_of(logits, properties)
    np.save(task["result"], label)
    return meter.result({})


def _properties(properties: Mapping[str, Any]) -> Json:
    """Return nnU-Net's properties as it has them: JSON knows no tuples."""
    return {name: tuple(value) if name.startswith("shape") else value for name, value in properties.items()}


def _tiny_export(logits: Array, properties: Mapping[str, Any]) -> tuple[Array, Json]:
    """Return a corner of a network's output and its properties, to warm up with."""
    corner = np.ascontiguousarray(logits[:, :TINY_SLICES, :TINY_EDGE, :TINY_EDGE])
    whole = properties["shape_before_cropping"]
    shape = tuple(
        max(1, round(edge * part / of))
        for edge, part, of in zip(whole, corner.shape[1:], logits.shape[1:], strict=True)
    )
    return corner, {
        **properties,
        "shape_before_cropping": shape,
        "shape_after_cropping_and_before_resampling": shape,
        "bbox_used_for_cropping": [[0, edge] for edge in shape],
    }


def _nnunet_export(task: Json) -> Callable[[Array, Json], Array]:
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

    plans, configuration, dataset = _plans(task["model"])
    labels = plans.get_label_manager(dataset)

    def label_of(logits: Array, properties: Json) -> Array:
        return np.asarray(
            convert_predicted_logits_to_segmentation_with_correct_shape(
                logits, plans, configuration, labels, properties
            )
        )

    return label_of


def _mshub_export(task: Json) -> Callable[[Array, Json], Array]:
    """Return MSHub's way from a network's output to the label: the one place that knows what it is called."""
    import torch

    engine = _engine(task)
    return lambda logits, properties: np.asarray(engine.segmentation(torch.from_numpy(logits), properties))


def _plans(model: str) -> tuple[Any, Any, Json]:
    """Return plans, configuration and dataset.json as nnU-Net itself opens them."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(str(Path(model) / "plans.json"))
    dataset: Json = json.loads((Path(model) / "dataset.json").read_text(encoding="utf-8"))
    return plans, plans.get_configuration(CONFIGURATION), dataset


def _engine(task: Json) -> Any:
    import torch

    from mshub.nnunet.engine import Engine
    from mshub.nnunet.folder import ModelFolder

    torch.set_num_threads(task["threads"])
    return Engine(ModelFolder.open(Path(task["model"])), ("0",), torch.device("cpu"))


# -- preprocessing ----------------------------------------------------------------------------------------------------


def _preprocessing(task: Json) -> Json:
    image = np.load(task["image"])
    prepare = (_nnunet_preprocessing if task["arm"]["program"] == NNUNET else _mshub_preprocessing)(task)
    prepare(image[:, :TINY_SLICES, :TINY_EDGE, :TINY_EDGE].copy(), dict(task["properties"]))
    with Meter() as meter:
        prepared = prepare(image, dict(task["properties"]))
    np.save(task["result"], prepared)
    return meter.result({})


def _nnunet_preprocessing(task: Json) -> Callable[[Array, Json], Array]:
    plans, configuration, dataset = _plans(task["model"])
    preprocessor = configuration.preprocessor_class(verbose=False)

    def prepare(image: Array, properties: Json) -> Array:
        return np.asarray(preprocessor.run_case_npy(image, None, properties, plans, configuration, dataset)[0])

    return prepare


def _mshub_preprocessing(task: Json) -> Callable[[Array, Json], Array]:
    engine = _engine(task)
    return lambda image, properties: np.asarray(engine.preprocess(image, properties)[0])


# -- whole requests ---------------------------------------------------------------------------------------------------


def _request(task: Json) -> Json:
    if not task["arm"]["warm"]:
        return _cold(task)
    import torch

    torch.set_num_threads(task["threads"])
    on_gpu = task["arm"].get("device") == "cuda"
    request = (_warm_nnunet if task["arm"]["program"] == NNUNET else _warm_mshub)(task)
    with Meter() as meter:
        request(Path(task["tiny"]), Path(task["result"]), meter)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with Meter() as meter:
        stages = request(Path(task["image"]), Path(task["result"]), meter)
    measured = meter.result(stages)
    if on_gpu:
        measured["gpu_peak"] = torch.cuda.max_memory_allocated()
        measured["floor_s"] = floor_seconds(task)
    if task["arm"]["program"] == MSHUB:
        with Meter() as again:
            stages = request(Path(task["image"]), Path(task["result"]), again)
        measured["second"] = again.result(stages)
    return measured


Request = Callable[[Path, Path, Meter], Mapping[str, float]]
"""Segments an image file into a label file; returns the seconds of its stages."""


def _warm_nnunet(task: Json) -> Request:
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    class Timed(nnUNetPredictor):  # type: ignore[misc]
        """nnU-Net's predictor, telling when its network begins and ends: what is before and after are other stages."""

        meter: Meter | None = None

        def predict_logits_from_preprocessed_data(self, data: torch.Tensor) -> torch.Tensor:
            self._lap("preprocess")
            logits: torch.Tensor = super().predict_logits_from_preprocessed_data(data)
            self._lap("network")
            return logits

        def _lap(self, stage: str) -> None:
            if self.meter is not None:
                self.meter.lap(stage)

    device = torch.device(task["arm"].get("device", "cpu"))
    predictor = Timed(
        use_mirroring=task["arm"]["mirroring"],
        perform_everything_on_device=device.type == "cuda",
        device=device,
        allow_tqdm=False,
    )
    predictor.initialize_from_trained_model_folder(task["model"], ("0",), "checkpoint_final.pth")
    reader = predictor.plans_manager.image_reader_writer_class()

    def request(image: Path, label: Path, meter: Meter) -> Mapping[str, float]:
        predictor.meter = meter
        data, properties = reader.read_images([str(image)])
        meter.lap("read")
        segmentation = predictor.predict_single_npy_array(data, properties)
        meter.lap("export")
        reader.write_seg(segmentation, str(label), properties)
        meter.lap("write")
        return meter.laps()

    return request


def _warm_mshub(task: Json) -> Request:
    from mshub.nnunet.folder import ModelFolder
    from mshub.nnunet.network_cache import NetworkCache
    from mshub.nnunet.predictor import NNUNetPredictor
    from mshub.volume_io import write_volume

    cache = NetworkCache(kept=Path(task["home"]) / "openvino")
    predictor = NNUNetPredictor(ModelFolder.open(Path(task["model"])), cache)
    options = mshub_options(task["arm"])

    def request(image: Path, label: Path, meter: Meter) -> Mapping[str, float]:
        prediction = predictor.predict([image], options)
        began = time.perf_counter()
        write_volume(label, prediction.labels.array_xyz, prediction.labels.grid)
        return {**prediction.seconds, "write": time.perf_counter() - began}

    return request


def mshub_options(arm: Mapping[str, Any]) -> Any:
    """Return the options of an arm: what else a prediction can be asked for is added here."""
    from mshub.nnunet.predictor import PROFILES, PredictOptions

    device = arm.get("device", "cpu")
    return PredictOptions(PROFILES[arm["profile"]], device=device, runtime=arm["runtime"])


def floor_seconds(task: Json) -> float:
    """Return how long the arithmetic of all passes takes at least: at the rate of a large product of matrices."""
    import torch
    from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
    from torch.utils.flop_counter import FlopCounterMode

    from mshub.nnunet.engine import load_network
    from mshub.nnunet.folder import ModelFolder

    folder = ModelFolder.open(Path(task["model"]))
    patch = folder.configuration_manager.patch_size
    network = load_network(folder, folder.checkpoint("0")["network_weights"]).eval().cuda()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(torch.zeros((1, len(folder.channels), *patch), device="cuda"))
    image = [max(edges) for edges in zip(task["network_shape"], patch, strict=True)]
    tiles = np.prod([len(steps) for steps in compute_steps_for_sliding_window(image, patch, NNUNET_STEP)])
    copies = 2 ** len(folder.mirror_axes or ()) if task["arm"]["mirroring"] else 1
    return float(counter.get_total_flops() * tiles * copies / _operations_per_second())


def _operations_per_second() -> float:
    """Return the rate of a product of large matrices in half precision."""
    import torch

    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.half)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    matrix @ matrix  # warms up
    begin.record()
    for _ in range(10):
        matrix @ matrix
    end.record()
    torch.cuda.synchronize()
    return float(10 * 2 * len(matrix) ** 3 / (begin.elapsed_time(end) / 1000))


def _cold(task: Json) -> Json:
    """Measure a command line from start to end; the memory is that of all its processes."""
    scratch = Path(task["result"]).parent / "cold"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    arguments, label = (_nnunet_command if task["arm"]["program"] == NNUNET else _mshub_command)(task, scratch)
    environment = {**os.environ, "MSHUB_HOME": task["home"]}
    with Meter(children=True) as meter, (scratch / "output.txt").open("w") as output:
        done = subprocess.run(
            [sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
        )
    if done.returncode != 0 or not label.is_file():
        raise RuntimeError(f"the command ended with {done.returncode}:\n{(scratch / 'output.txt').read_text()}")
    label.replace(task["result"])
    return meter.result({})


def _nnunet_command(task: Json, scratch: Path) -> tuple[list[str], Path]:
    """One process each for preprocessing and export instead of three: there is one image."""
    image = Path(task["image"])
    paths = ["-i", str(image.parent), "-o", str(scratch), "-m", task["model"]]
    more = ["-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1", "--disable_progress_bar"]
    mirroring = [] if task["arm"]["mirroring"] else ["--disable_tta"]
    return ["-c", NNUNET_MAIN, *paths, *more, *mirroring], scratch / image.name.replace("_0000", "")


def _mshub_command(task: Json, scratch: Path) -> tuple[list[str], Path]:
    label = scratch / "label.nii.gz"
    arguments = ["-m", "mshub", "predict", task["model_id"], task["image"], "-o", str(label), "--device", "cpu"]
    return [*arguments, "--profile", task["arm"]["profile"]], label


# -- the server -------------------------------------------------------------------------------------------------------


def _server(task: Json) -> Json:
    """Post to a running server: to warm up, then as often as asked; return wall times and what the answers tell."""
    import httpx

    sys.path.insert(0, str(ROOT / "tests"))
    from live import LiveServer

    folder = Path(task["result"]).parent
    server = LiveServer(Path(task["home"]), ["--studies", str(Path(task["image"]).parent)], folder)
    url = f"{server.url}/infer/{task['model_id']}?image=case&output=all"
    form = {"params": json.dumps({"profile": task["arm"]["profile"], "device": "cpu"})}
    client, requests = httpx.Client(timeout=600), []  # kept open: making one takes as long as a small answer
    try:
        for _ in range(task["repeats"] + 1):
            began = time.perf_counter()
            answer = client.post(url, data=form)
            wall = time.perf_counter() - began
            answer.raise_for_status()
            latencies = _told(answer.text)["latencies"]
            requests.append({"wall_s": wall, "told_s": latencies["total"] - latencies["write"]})
    finally:
        client.close()
        server.stop()
    return {"requests": requests[1:]}


def _told(answer: str) -> Json:
    """Return the JSON part of an answer in several parts."""
    told: Json
    told, _ = json.JSONDecoder().raw_decode(answer, answer.index("{"))
    return told
