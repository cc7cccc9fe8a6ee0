"""The loop on real images: five rounds of corrections through a live server, beside nnU-Net's own ways to train.

    python bench/learning_curve.py --data DIR      # DIR holds imagesTr and labelsTr in nnU-Net's file naming

A base model is trained on few cases. In each round, new cases are predicted and corrected (the reference label is what
the clinician submits, with its segments numbered as 3D Slicer numbers a scene) through MONAI Label's own client, a
training is started as Slicer starts it, and the gate decides. Every version is then scored on cases that were never
trained on, never held out and never shown to the server. Beside it, with the same plans and preprocessed by nnU-Net:

* ``scratch``: from random weights, on the base's cases *and* the corrections, for the iterations of base and rounds;
* ``pretrained``: nnU-Net's ``-pretrained_weights`` (SGD 1e-2, new segmentation head) on the corrections, from the base;
* ``pretrained, Adam``: the same with the optimiser and learning rate that suit so few iterations best.

Writes ``bench/out/learning-curve/``: results.json, table.md, learning-curve.png.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from mshub.cases import ReviewedCase
from mshub.evaluation import Evaluator
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.predictor import PROFILES, PredictOptions
from mshub.scores import dice_by_structure, mean_dice
from mshub.store import ModelStore
from small_nnunet import (
    CONFIGURATION,
    ITERATIONS_PER_EPOCH,
    PLANS_NAME,
    Json,
    Recipe,
    SmallTrainer,
    prepare_workspace,
    train,
    write_json,
    write_model_folder,
)
from train_hippocampus import ENDING, LABELS, write_raw_dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from live import LiveServer  # noqa: E402

MODEL_ID = "hippocampus-mr"
STRUCTURES = {name: value for name, value in LABELS.items() if value}
SCENE_ORDER = {"hippocampus_posterior": 1, "hippocampus_anterior": 3}
"""How 3D Slicer numbered the segments of the scene: not as the model does."""
PATCH = (40, 56, 40)
UNSEEN = 70
MIRROR_AXES = (0, 1, 2)
ARMS = ("scratch", "pretrained", "pretrained, Adam")


# -- the cases --------------------------------------------------------------------------------------------------------


def split_cases(data: Path, seed: int, base: int, pool: int) -> dict[str, list[str]]:
    """Share the cases out at random: for the base model, for the rounds, and the rest, never trained on."""
    cases = sorted(path.name.removesuffix(ENDING) for path in (data / "labelsTr").glob(f"*{ENDING}"))
    random.Random(seed).shuffle(cases)
    return {"base": cases[:base], "pool": cases[base : base + pool], "unseen": cases[base + pool :][:UNSEEN]}


def reviewed_case(data: Path, case: str) -> ReviewedCase:
    """Return a case with its reference label."""
    images = (data / "imagesTr" / f"{case}_0000{ENDING}",)
    return ReviewedCase(case, images, data / "labelsTr" / f"{case}{ENDING}", STRUCTURES, tuple(STRUCTURES), case)


def dice_on(model: Path, data: Path, cases: list[str]) -> Json:
    """Score a model folder without mirroring, the same way for every arm."""
    evaluator = Evaluator(ModelFolder.open(model), PredictOptions(PROFILES["fast"], device="cpu"))
    scores, failures = evaluator.score([reviewed_case(data, case) for case in cases], lambda _: None)
    if failures:
        raise RuntimeError(f"no prediction for {failures}")
    return {"mean": mean_dice(scores), **dice_by_structure(scores)}


# -- our loop ---------------------------------------------------------------------------------------------------------


def run_loop(arguments: argparse.Namespace, base: Path, cases: dict[str, list[str]], home: Path) -> list[Json]:
    """Run all rounds through a live server; returns one row per round."""
    studies = home / "studies"
    studies.mkdir(parents=True)
    for case in cases["pool"]:
        shutil.copyfile(arguments.data / "imagesTr" / f"{case}_0000{ENDING}", studies / f"{case}_0000{ENDING}")
    environment = {**os.environ, "MSHUB_HOME": str(home)}
    subprocess.run([sys.executable, "-m", "mshub", "add", MODEL_ID, str(base)], env=environment, check=True)
    server = LiveServer(home, ["--studies", str(studies)], home)
    try:
        size = len(cases["pool"]) // arguments.rounds
        rounds = []
        for number in range(arguments.rounds):
            for case in cases["pool"][number * size : (number + 1) * size]:
                correct(server, arguments.data, case, home)
            rounds.append(one_round(server, arguments, number + 1, home))
            print(json.dumps({key: rounds[-1][key] for key in ("round", "version", "outcome", "hold_out")}), flush=True)
        return rounds
    finally:
        server.stop()


def correct(server: LiveServer, data: Path, case: str, scratch: Path) -> None:
    """Predict a case, then submit its reference label as a clinician's correction."""
    client = server.client(scratch)
    client.infer(MODEL_ID, case, {"save_label": True, "label_tag": "original", "profile": "fast"})
    reference = nib.load(data / "labelsTr" / f"{case}{ENDING}")
    values = np.asarray(reference.dataobj)
    scene = np.zeros(values.shape, np.uint8)
    for name, number in SCENE_ORDER.items():
        scene[values == STRUCTURES[name]] = number
    path = scratch / f"{case}{ENDING}"
    nib.save(nib.Nifti1Image(scene, reference.affine), path)
    info = [{"name": name, "idx": number} for name, number in SCENE_ORDER.items()]
    client.save_label(case, str(path), params={"label_info": info, "model": MODEL_ID})
    path.unlink()


def one_round(server: LiveServer, arguments: argparse.Namespace, number: int, home: Path) -> Json:
    """Start a training as a client does, wait for it, and let a person promote what only waits for one."""
    client = server.client(home)
    epochs = max(1, arguments.iterations // 25)
    options = {"epochs": epochs, "iterations": 25, **json.loads(arguments.recipe)}
    started = time.monotonic()
    client.train_start(MODEL_ID, options)
    while True:
        stats = next(iter(client.info()["train_stats"].values()))
        if stats.get("state") not in ("queued", "running"):
            break
        time.sleep(2)
    if stats["state"] != "done":
        raise RuntimeError(f"round {number} ended as {stats}")
    store = ModelStore(home)
    version = store.version(MODEL_ID, stats["version"])
    lineage = version.record["lineage"]
    change = [comparison["overall"]["mean"] for comparison in lineage["verdict"]["comparisons"]]
    if stats["outcome"] == "needs a person" and all(value > 0 for value in change):
        store.promote(MODEL_ID, version.version, "a person looked at the report")
    return {
        "round": number,
        "version": version.version,
        "outcome": stats["outcome"],
        "serves": store.current(MODEL_ID).version,
        "trained_on": [case["case"] for case in lineage["cases"]],
        "hold_out": len(lineage["held_out"]),
        "iterations": epochs * 25,
        "seconds": round(time.monotonic() - started),
        "reasons": lineage["verdict"]["reasons"],
    }


# -- nnU-Net's own ways -----------------------------------------------------------------------------------------------


class StockOptimiser(SmallTrainer):
    """`SmallTrainer` with nnU-Net's own optimiser: SGD with momentum 0.99 at 1e-2."""

    def configure_optimizers(self) -> tuple[Any, Any]:
        """Return nnU-Net's optimiser and schedule."""
        self.initial_lr = 1e-2
        return nnUNetTrainer.configure_optimizers(self)  # type: ignore[no-any-return]


def preprocess(data: Path, cases: list[str], base: Path, work: Path) -> None:
    """Let nnU-Net preprocess all cases once, by the base model's plans."""
    raw = work / "Dataset004_Hippocampus"
    write_raw_dataset(data, cases, raw)
    name = prepare_workspace(raw, work)
    folder = Path(nnUNet_preprocessed) / name
    folder.mkdir(parents=True)
    shutil.copyfile(base / "plans.json", folder / f"{PLANS_NAME}.json")
    shutil.copyfile(base / "dataset_fingerprint.json", folder / "dataset_fingerprint.json")
    shutil.copyfile(raw / "dataset.json", folder / "dataset.json")
    DefaultPreprocessor(verbose=False).run(name, CONFIGURATION, PLANS_NAME, num_processes=2)


def train_arm(task: Json) -> Json:
    """Train one arm for one round in a process of its own, and score it."""
    torch.set_num_threads(1)
    work, base = Path(task["work"]), Path(task["base"])
    out = work / f"{task['arm']}-{task['round']}"
    shutil.rmtree(out, ignore_errors=True)
    mine = out / "workspace"
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[variable] = str(mine / variable)
        (mine / variable).mkdir(parents=True)
    os.environ.update(nnUNet_n_proc_DA="1")
    name = "Dataset004_Hippocampus"
    target = mine / "nnUNet_preprocessed" / name
    target.mkdir()
    for path in (work / "nnUNet_preprocessed" / name).iterdir():
        (target / path.name).symlink_to(path)
    write_json(target / "splits_final.json", [{"train": task["cases"], "val": task["cases"][:1]}])
    plans = json.loads((base / "plans.json").read_text(encoding="utf-8"))
    dataset = json.loads((base / "dataset.json").read_text(encoding="utf-8"))
    recipe = Recipe(
        iterations=task["iterations"], patch_zyx=PATCH, mirror_axes=MIRROR_AXES, seed=task["seed"] + task["round"]
    )
    np.random.seed(recipe.seed)
    random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    kind = StockOptimiser if task["arm"] == "pretrained" else SmallTrainer
    trainer = kind({**plans, "continue_training": False}, CONFIGURATION, 0, dataset, torch.device("cpu"))
    trainer.follow(recipe)
    trainer.initialize()
    if task["arm"] != "scratch":
        load_pretrained_weights(trainer.network, str(base / "fold_0" / "checkpoint_final.pth"))
    started = time.process_time()
    trainer.run_training()
    seconds = time.process_time() - started
    write_model_folder(trainer, plans, dataset, base / "dataset_fingerprint.json", out / "model")
    dice = dice_on(out / "model", Path(task["data"]), task["unseen"])
    shutil.rmtree(mine)
    return {"arm": task["arm"], "round": task["round"], "iterations": trainer.num_epochs * ITERATIONS_PER_EPOCH,
            "cpu_seconds": round(seconds), "dice": dice}  # fmt: skip


def run_arms(arguments: argparse.Namespace, base: Path, cases: Json, rounds: list[Json], work: Path) -> list[Json]:
    """Train every arm for every round, two at a time."""
    preprocess(arguments.data, [*cases["base"], *cases["pool"]], base, work)
    shared = {"work": str(work), "base": str(base), "data": str(arguments.data), "seed": arguments.seed}
    tasks = []
    for row in rounds:
        spent = sum(other["iterations"] for other in rounds[: row["round"]])
        for arm in ARMS:
            scratch = arm == "scratch"
            tasks.append({
                **shared, "arm": arm, "round": row["round"], "unseen": cases["unseen"],
                "cases": sorted([*cases["base"], *row["trained_on"]] if scratch else row["trained_on"]),
                "iterations": spent + (arguments.base_iterations if scratch else 0),
            })  # fmt: skip
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = []
        for result in pool.map(train_arm, tasks):
            print(json.dumps(result), flush=True)
            results.append(result)
    return results


# -- the tables -------------------------------------------------------------------------------------------------------


def write_table(path: Path, results: Json) -> None:
    """Write the Markdown table of mean Dice per round."""
    lines = [
        "| round | cases trained on | ours: iterations | **ours (serving)** | ours (candidate) | gate | "
        + " | ".join(f"{arm} (iterations)" for arm in ARMS)
        + " |",
        "|---" * (6 + len(ARMS)) + "|",
        f"| base | {len(results['cases']['base'])} | {results['base_iterations']} "
        f"| **{results['base_dice']['mean']:.4f}** "
        "| | |" + " |" * len(ARMS),
    ]
    for row in results["rounds"]:
        others = {one["arm"]: one for one in results["arms"] if one["round"] == row["round"]}
        cells = [f"{others[arm]['dice']['mean']:.4f} ({others[arm]['iterations']})" for arm in ARMS if arm in others]
        spent = sum(other["iterations"] for other in results["rounds"][: row["round"]])
        lines.append(
            f"| {row['round']} | {len(row['trained_on'])} | +{row['iterations']} = {spent} "
            f"| **{row['serving_dice']['mean']:.4f}** ({row['serves']}) | {row['dice']['mean']:.4f} ({row['version']}) "
            f"| {row['outcome']} | " + " | ".join(cells) + " |"
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot(path: Path, results: Json) -> None:
    """Draw mean Dice on the unseen cases against rounds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rounds = [0, *(row["round"] for row in results["rounds"])]
    ours = [results["base_dice"]["mean"], *(row["serving_dice"]["mean"] for row in results["rounds"])]
    axes.plot(rounds, ours, "o-", color="#1f5fa8", linewidth=2.2, label="MSHub: the version that serves")
    styles = {"scratch": ("s--", "#5b6875"), "pretrained": ("^--", "#b3261e"), "pretrained, Adam": ("v--", "#9a6700")}
    names = {
        "scratch": "nnU-Net from scratch, base and corrected cases",
        "pretrained": "nnU-Net -pretrained_weights",
        "pretrained, Adam": "nnU-Net -pretrained_weights, Adam",
    }
    for arm, (style, colour) in styles.items():
        rows = [one for one in results["arms"] if one["arm"] == arm]
        axes.plot(
            [one["round"] for one in rows], [one["dice"]["mean"] for one in rows], style, color=colour, label=names[arm]
        )
    axes.set(xlabel="round of corrections", ylabel=f"mean Dice on {len(results['cases']['unseen'])} unseen cases")
    axes.set_xticks(rounds)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Five rounds of the loop on hippocampus MR.")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "hippocampus")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out" / "learning-curve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base-cases", type=int, default=3)
    parser.add_argument("--base-iterations", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--per-round", type=int, default=10, help="cases corrected in each round")
    parser.add_argument("--iterations", type=int, default=100, help="our iterations per round")
    parser.add_argument("--recipe", default="{}", help="JSON of further recipe options")
    parser.add_argument("--ours-only", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    cases = split_cases(arguments.data, arguments.seed, arguments.base_cases, arguments.rounds * arguments.per_round)
    base = arguments.out / f"base-{arguments.seed}"
    with tempfile.TemporaryDirectory() as scratch:
        if not (base / "fold_0").is_dir():
            raw = Path(scratch) / "Dataset004_Hippocampus"
            write_raw_dataset(arguments.data, cases["base"], raw)
            recipe = Recipe(
                iterations=arguments.base_iterations, patch_zyx=PATCH, mirror_axes=MIRROR_AXES, seed=arguments.seed
            )
            train(raw, base, recipe)
        home = Path(scratch) / "home"
        results: Json = {"command": " ".join(sys.argv), "cases": cases, "base_iterations": arguments.base_iterations}
        results["rounds"] = run_loop(arguments, base, cases, home)
        store = ModelStore(home)
        unseen = cases["unseen"]
        results["base_dice"] = dice_on(store.version(MODEL_ID, "v1").model_path, arguments.data, unseen)
        known = {"v1": results["base_dice"]}
        for row in results["rounds"]:
            known[row["version"]] = dice_on(store.version(MODEL_ID, row["version"]).model_path, arguments.data, unseen)
            row["dice"], row["serving_dice"] = known[row["version"]], known[row["serves"]]
            print(row["round"], row["version"], known[row["version"]], flush=True)
        shutil.copytree(home / "reports", arguments.out / "reports", dirs_exist_ok=True)
        work = Path(scratch) / "arms"
        results["arms"] = [] if arguments.ours_only else run_arms(arguments, base, cases, results["rounds"], work)
    write_json(arguments.out / "results.json", results)
    write_table(arguments.out / "table.md", results)
    plot(arguments.out / "learning-curve.png", results)
    print((arguments.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
