"""The loop on real images: five rounds of corrections through a live server, beside nnU-Net's own ways to train.

    python bench/learning_curve.py --data DIR      # DIR holds imagesTr and labelsTr in nnU-Net's file naming

A base model is trained on few cases. In each round, new cases are predicted and corrected (the reference label is what
the clinician submits, with its segments numbered as 3D Slicer numbers a scene) through MONAI Label's own client, a
training is started as Slicer starts it, and the gate decides. Every version is then scored on cases that were never
trained on, never held out and never shown to the server. Beside it, with the same plans, on the same cases:

* ``pretrained``: nnU-Net's ``-pretrained_weights`` (a new segmentation head, SGD at 1e-2) in every round, from its own
  result of the round before, for the iterations of the round;
* ``scratch``: nnU-Net's own training from random weights for the iterations of all rounds so far, the base's cases too;
* ``scratch, Adam``: the same with Adam at 2e-3, which learns more in so few iterations, as the base model did;
* ``pretrained again``: ``-pretrained_weights`` from the base model every time, for the iterations of all rounds so far.

Writes ``bench/out/learning-curve/``: results.json, table.md, learning-curve.png. What is done is kept there, the base
model, the rounds and every arm: started again with the same options, it goes on where it was.
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
from mshub.scores import CaseScore, dice_by_structure, mean_dice
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
DONE = "rounds-done"
MIRROR_AXES = (0, 1, 2)
ARMS = ("pretrained", "scratch", "scratch, Adam", "pretrained again")


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


def scores_of(model: ModelFolder, cases: list[ReviewedCase]) -> list[CaseScore]:
    """Return the scores without mirroring, in this process, on the CPU."""
    scores, failures = Evaluator(model, PredictOptions(PROFILES["balanced"], device="cpu")).score(cases, lambda _: None)
    if failures:
        raise RuntimeError(f"no prediction for {failures}")
    return scores


def dice_on(model: Path, data: Path, cases: list[str]) -> Json:
    """Score a model folder without mirroring, the same way for every arm."""
    scores = scores_of(ModelFolder.open(model), [reviewed_case(data, case) for case in cases])
    return {"mean": mean_dice(scores), **dice_by_structure(scores)}


# -- our loop ---------------------------------------------------------------------------------------------------------


def run_loop(arguments: argparse.Namespace, base: Path, cases: dict[str, list[str]], home: Path) -> None:
    """Run all rounds through a live server; `home` keeps every version."""
    shutil.rmtree(home, ignore_errors=True)
    studies = home / "studies"
    studies.mkdir(parents=True)
    for case in cases["pool"]:
        shutil.copyfile(arguments.data / "imagesTr" / f"{case}_0000{ENDING}", studies / f"{case}_0000{ENDING}")
    environment = {**os.environ, "MSHUB_HOME": str(home)}
    subprocess.run([sys.executable, "-m", "mshub", "add", MODEL_ID, str(base)], env=environment, check=True)
    server = LiveServer(home, ["--studies", str(studies)], home)
    try:
        size = len(cases["pool"]) // arguments.rounds
        for number in range(arguments.rounds):
            for case in cases["pool"][number * size : (number + 1) * size]:
                correct(server, arguments.data, case, home)
            one_round(server, arguments, home)
            print(json.dumps(rows_of(ModelStore(home))[-1]), flush=True)
    finally:
        server.stop()
    (home / DONE).touch()


def correct(server: LiveServer, data: Path, case: str, scratch: Path) -> None:
    """Predict a case, then submit its reference label as a clinician's correction."""
    client = server.client(scratch)
    client.infer(MODEL_ID, case, {"save_label": True, "label_tag": "original", "profile": "balanced"})
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


def one_round(server: LiveServer, arguments: argparse.Namespace, home: Path) -> None:
    """Start a training as a client does, wait for it, and let a person promote what only waits for one."""
    client = server.client(home)
    options = {"epochs": max(1, arguments.iterations // 25), "iterations": 25, **arguments.recipe}
    client.train_start(MODEL_ID, options)
    while client.train_status(check_if_running=True):
        time.sleep(2)
    stats = next(iter(client.info()["train_stats"].values()))
    if stats["state"] != "done":
        raise RuntimeError(f"the round ended as {stats}")
    store = ModelStore(home)
    comparisons = store.version(MODEL_ID, stats["version"]).record["lineage"]["verdict"]["comparisons"]
    if stats["outcome"] == "needs a person" and all(found["overall"]["mean"] > 0 for found in comparisons):
        store.promote(MODEL_ID, stats["version"], "a person looked at the report")


def rows_of(store: ModelStore) -> list[Json]:
    """Return what every round came to, from the versions themselves."""
    promoted = {step["to"] for step in store.history(MODEL_ID)}
    rows: list[Json] = []
    serves = "v1"
    for version in store.versions(MODEL_ID)[1:]:
        lineage = version.record["lineage"]
        serves = version.version if version.version in promoted else serves
        rows.append({
            "round": len(rows) + 1,
            "version": version.version,
            "outcome": lineage["verdict"]["outcome"],
            "serves": serves,
            "trained_on": [case["case"] for case in lineage["cases"]],
            "hold_out": len(lineage["held_out"]),
            "iterations": lineage["recipe"]["epochs"] * lineage["recipe"]["iterations"],
            "seconds": lineage["seconds"],
            "reasons": lineage["verdict"]["reasons"],
        })  # fmt: skip
    return rows


def dice_of_versions(store: ModelStore, data: Path, unseen: list[str], kept: Path) -> Json:
    """Score every version on the unseen cases, each once."""
    known: Json = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    for version in store.versions(MODEL_ID):
        if version.version not in known:
            known[version.version] = dice_on(version.model_path, data, unseen)
            write_json(kept, known)
            print(version.version, known[version.version], flush=True)
    return known


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
    kept = Path(task["kept"])
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    torch.set_num_threads(1)
    work, base = Path(task["work"]), Path(task["base"])
    mine = work / f"{task['arm']}-{task['round']}"
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
    kind = SmallTrainer if "Adam" in task["arm"] else StockOptimiser
    trainer = kind({**plans, "continue_training": False}, CONFIGURATION, 0, dataset, torch.device("cpu"))
    trainer.follow(recipe)
    trainer.initialize()
    if task["arm"].startswith("pretrained"):
        load_pretrained_weights(trainer.network, str(Path(task["weights"]) / "fold_0" / "checkpoint_final.pth"))
    started = time.process_time()
    trainer.run_training()
    seconds = time.process_time() - started
    write_model_folder(trainer, plans, dataset, base / "dataset_fingerprint.json", Path(task["model"]))
    dice = dice_on(Path(task["model"]), Path(task["data"]), task["unseen"])
    shutil.rmtree(mine)
    result = {"arm": task["arm"], "round": task["round"], "iterations": trainer.num_epochs * ITERATIONS_PER_EPOCH,
              "cpu_seconds": round(seconds), "dice": dice}  # fmt: skip
    write_json(kept, result)
    print(json.dumps(result), flush=True)
    return result


def train_in_turn(tasks: list[Json]) -> list[Json]:
    """Train one arm for several rounds, each perhaps from the one before."""
    return [train_arm(task) for task in tasks]


def run_arms(arguments: argparse.Namespace, base: Path, cases: Json, rounds: list[Json]) -> list[Json]:
    """Train every arm for every round, two at a time."""
    kept = arguments.out / f"arms-{arguments.seed}"
    kept.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        preprocess(arguments.data, [*cases["base"], *cases["pool"]], base, Path(scratch))
        shared = {"work": scratch, "base": str(base), "data": str(arguments.data), "unseen": cases["unseen"]}
        turns: list[list[Json]] = []
        for arm in ARMS:
            tasks = [shared | arm_of(arm, row, rounds, cases["base"], base, kept, arguments.seed) for row in rounds]
            turns += [tasks] if arm == "pretrained" else [[task] for task in tasks]
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            return [result for results in pool.map(train_in_turn, turns) for result in results]


def arm_of(arm: str, row: Json, rounds: list[Json], base_cases: list[str], base: Path, kept: Path, seed: int) -> Json:
    """Return cases, iterations and files of an arm after a round."""
    number = row["round"]
    spent = sum(other["iterations"] for other in rounds[:number])
    before = kept / f"{arm}-{number - 1}"
    return {
        "arm": arm,
        "round": number,
        "seed": seed,
        "cases": sorted([*base_cases, *row["trained_on"]] if arm.startswith("scratch") else row["trained_on"]),
        "iterations": row["iterations"] if arm == "pretrained" else spent,
        "weights": str(before if arm == "pretrained" and number > 1 else base),
        "model": str(kept / f"{arm}-{number}"),
        "kept": str(kept / f"{arm}-{number}.json"),
    }


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
        cells = [
            f"{others[arm]['dice']['mean']:.4f} ({others[arm]['iterations']})" if arm in others else "" for arm in ARMS
        ]
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
    styles = {
        "pretrained": ("^--", "#b3261e", "nnU-Net -pretrained_weights, round by round"),
        "scratch, Adam": ("s--", "#5b6875", "nnU-Net from scratch, Adam, base and corrected cases"),
        "pretrained again": ("v:", "#d98880", "nnU-Net -pretrained_weights from the base, all iterations so far"),
    }
    for arm, (style, colour, name) in styles.items():
        rows = [one for one in results["arms"] if one["arm"] == arm]
        dice = [one["dice"]["mean"] for one in rows]
        if rows:
            axes.plot([one["round"] for one in rows], dice, style, color=colour, label=name)
    axes.set(xlabel="round of corrections", ylabel=f"mean Dice on {len(results['cases']['unseen'])} unseen cases")
    axes.set_xticks(rounds)
    axes.set_ylim(bottom=results["base_dice"]["mean"] - 0.05)  # what starts from nothing comes from below
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Five rounds of the loop on hippocampus MR.")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "hippocampus")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out" / "learning-curve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base-cases", type=int, default=5)
    parser.add_argument("--base-iterations", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--per-round", type=int, default=10, help="cases corrected in each round")
    parser.add_argument("--iterations", type=int, default=75, help="our iterations per round")
    parser.add_argument("--recipe", type=json.loads, default={}, help="JSON of further recipe options")
    parser.add_argument("--ours-only", action="store_true")
    arguments = parser.parse_args()
    cases = split_cases(arguments.data, arguments.seed, arguments.base_cases, arguments.rounds * arguments.per_round)
    base, home = arguments.out / f"base-{arguments.seed}", arguments.out / f"home-{arguments.seed}"
    if not (base / "fold_0").is_dir():
        train_base(arguments, base, cases["base"])
    if not (home / DONE).is_file():
        run_loop(arguments, base, cases, home)
    store = ModelStore(home)
    results: Json = {"command": " ".join(sys.argv), "cases": cases, "base_iterations": arguments.base_iterations}
    dice = dice_of_versions(store, arguments.data, cases["unseen"], home / "dice.json")
    results["rounds"] = [
        {**row, "dice": dice[row["version"]], "serving_dice": dice[row["serves"]]} for row in rows_of(store)
    ]
    results["base_dice"] = dice["v1"]
    results["arms"] = [] if arguments.ours_only else run_arms(arguments, base, cases, results["rounds"])
    write_json(arguments.out / "results.json", results)
    write_table(arguments.out / "table.md", results)
    plot(arguments.out / "learning-curve.png", results)
    print((arguments.out / "table.md").read_text(encoding="utf-8"))


def train_base(arguments: argparse.Namespace, base: Path, cases: list[str]) -> None:
    """Train the model that the loop starts from."""
    recipe = Recipe(iterations=arguments.base_iterations, patch_zyx=PATCH, mirror_axes=MIRROR_AXES, seed=arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "Dataset004_Hippocampus"
        write_raw_dataset(arguments.data, cases, raw)
        train(raw, base, recipe)


if __name__ == "__main__":
    main()
