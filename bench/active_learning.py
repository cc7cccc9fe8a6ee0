"""Which strategy should choose the next case to label? Strategies beside random ones and an oracle, over paired seeds.

    python bench/active_learning.py --data DIR      # DIR holds imagesTr and labelsTr in nnU-Net's file naming
    python bench/active_learning_report.py          # the tables and plots of what is done

A base model has learned a few cases of one scanner. Of the pool and of the test cases, a share looks as if it came from
another one (`forgetting.shifted`). In each round an arm chooses some cases of the pool; a clinician would correct what
the model predicts of them; the model of the round before is fine-tuned by MSHub's own trainer, with its default guard,
on all cases labelled so far, and scored on the test cases at 1 mm, without mirroring. Everything but the choice is the
same for all arms of a seed: the base model (trained anew for every seed), pool, test cases, and the seeds of every
fine-tuning. The network is planned once and the same for all; it is small and works at a coarse spacing, so that a
round takes seconds.

The arms are the strategies of `mshub.selection`, told only what the app would know, and

* ``foreground_random``: random, weighted by the predicted volume of all structures: the form for whole cases of the
  foreground-aware random that no method reliably beats (nnActive, arXiv 2511.19183);
* ``oracle``: the cases with the lowest true Dice, which nobody knows before they are labelled.

Beside the arms, for every seed: how well each measure of `mshub.uncertainty` ranks cases by their true Dice, with the
base model (alone, and with a second network from other random weights as a second fold) and with the model after all
rounds; and how well ``relabel`` finds labels that were made wrong on purpose.

What is done is kept in ``bench/out/active-learning/``, one JSON file per seed, arm and round: started again with the
same options, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

import small_nnunet
from forgetting import fine_tuned, shifted
from learning_curve import STRUCTURES, reviewed_case
from mshub.cases import ReviewedCase
from mshub.geometry import Array
from mshub.nnunet.engine import load_network
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.model_writing import write_trained
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.predictor import PROFILES, NNUNetPredictor, Prediction, PredictOptions
from mshub.nnunet.training_set import prepare
from mshub.recipe import Recipe
from mshub.scores import score_case
from mshub.selection import STRATEGIES, Case, Pool
from mshub.training_labels import read_reviewed_label
from mshub.uncertainty import Uncertainty
from train_hippocampus import ENDING, write_raw_dataset

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "out" / "active-learning"
CPU = torch.device("cpu")
SHIFTED = "-shifted"
"""How `forgetting.shifted` ends the ids of shifted cases."""
EPOCH = 10
"""Iterations per epoch of every training here."""
Json = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """The options that decide every number; runs of different sizes are kept apart by their folders.

    Attributes
    ----------
    base_cases, pool, test : int
        Cases of the base model, to choose from, and to score on.
    shifted : float
        Share of the pool and of the test cases that is shifted.
    rounds, queries : int
        Rounds, and cases labelled in each.
    base_iterations, iterations : int
        Of the base model, and of the fine-tuning of a round.
    learning_rate : float
    guard : str
        See `mshub.recipe.Recipe`.
    again : bool
        Each round starts from the base model, not from the model of the round before.
    spacing : float
        Of the network, in mm.
    patch : tuple of int
        Of the network, in voxels, axes z, y, x.
    draws : int
        How often labels are made wrong, for ``relabel``.
    """

    base_cases: int = 12
    pool: int = 64
    test: int = 60
    shifted: float = 0.4
    rounds: int = 4
    queries: int = 4
    base_iterations: int = 600
    iterations: int = 50
    learning_rate: float = 1e-3
    guard: str = "both"
    again: bool = False
    spacing: float = 2.0
    patch: tuple[int, ...] = (24, 32, 24)
    draws: int = 20


@dataclass(frozen=True)
class Seed:
    """One repetition: its folder, what it does and on what.

    Attributes
    ----------
    number : int
    data, out : Path
        The images; the folder of all seeds.
    sizes : Sizes
    """

    number: int
    data: Path
    out: Path
    sizes: Sizes

    @property
    def folder(self) -> Path:
        """Where its files are kept."""
        return self.out / f"seed-{self.number}"

    def done(self, name: str) -> Json | None:
        """Return a result that is kept, or None."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def keep(self, name: str, result: Json) -> Json:
        """Write a result; it is there as a whole or not at all."""
        path = self.folder / f"{name}.json"
        part = path.with_suffix(".part")
        small_nnunet.write_json(part, result)
        part.replace(path)
        return result

    def model(self, name: str) -> ModelFolder:
        """Open one of its models."""
        return ModelFolder.open(self.folder / name)

    def cases(self, part: str) -> list[ReviewedCase]:
        """Return the cases of ``base``, ``pool`` or ``test``."""
        stored = self.done("cases")
        if stored is None:
            raise RuntimeError(f"seed {self.number} has no cases yet")
        return [ReviewedCase.from_dict(case) for case in stored[part]]


# -- the cases --------------------------------------------------------------------------------------------------------


def deal(seed: Seed) -> None:
    """Share the cases out at random, and shift some of the pool and of the test cases."""
    if seed.done("cases"):
        return
    sizes = seed.sizes
    names = sorted(path.name.removesuffix(ENDING) for path in (seed.data / "labelsTr").glob(f"*{ENDING}"))
    random.Random(seed.number).shuffle(names)
    if len(names) < sizes.base_cases + sizes.pool + sizes.test:
        raise ValueError(f"{seed.data} has {len(names)} cases, too few for {sizes}")
    cases = iter([reviewed_case(seed.data, name) for name in names])
    base, pool, test = (list(islice(cases, count)) for count in (sizes.base_cases, sizes.pool, sizes.test))
    parts = {"base": base, "pool": some_shifted(seed, pool), "test": some_shifted(seed, test)}
    seed.keep("cases", {part: [case.as_dict() for case in chosen] for part, chosen in parts.items()})


def some_shifted(seed: Seed, cases: list[ReviewedCase]) -> list[ReviewedCase]:
    """Shift the first cases of a list that is in random order, and mix them with the others again."""
    folder = seed.folder / "images"
    folder.mkdir(parents=True, exist_ok=True)
    count = round(seed.sizes.shifted * len(cases))
    moved = [shifted(case, folder, 1000 * seed.number + number) for number, case in enumerate(cases[:count])]
    mixed = [*moved, *cases[count:]]
    random.Random(seed.number).shuffle(mixed)
    return mixed


# -- the models -------------------------------------------------------------------------------------------------------


def plan(data: Path, out: Path, sizes: Sizes) -> None:
    """Let nnU-Net plan the small network; its weights are not used."""
    if (out / "planned" / "plans.json").is_file():
        return
    recipe = small_nnunet.Recipe(
        iterations=1,
        patch_zyx=sizes.patch,
        target_spacing_zyx_mm=(sizes.spacing,) * 3,
        max_features=32,
        mirror_axes=(0, 1, 2),
    )
    cases = sorted(path.name.removesuffix(ENDING) for path in (data / "labelsTr").glob(f"*{ENDING}"))
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "Dataset004_Hippocampus"
        write_raw_dataset(data, cases[: sizes.base_cases], raw)
        small_nnunet.train(raw, out / "planned", recipe)


def random_weights(planned: ModelFolder, seed: int) -> dict[str, torch.Tensor]:
    """Return weights as nnU-Net begins with."""
    network: Any = load_network(planned, planned.checkpoint(planned.folds[0])["network_weights"])
    torch.manual_seed(seed)
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    network.apply(network.initialize)
    return dict(network.state_dict())


def train_base(seed: Seed) -> None:
    """Train the base model, and a second network from other random weights: the two folds of ``twins``."""
    if (seed.folder / "twins").is_dir():
        return
    planned = ModelFolder.open(seed.out / "planned")
    recipe = Recipe(
        epochs=-(-seed.sizes.base_iterations // EPOCH), iterations=EPOCH, learning_rate=4e-3, foreground=0.33,
        guard="none",
    )  # fmt: skip
    weights = {}
    for fold in range(2):
        number = 2 * seed.number + fold
        with tempfile.TemporaryDirectory() as scratch:
            write_trained(Path(scratch) / "start", planned, {"0": random_weights(planned, number)})
            start = ModelFolder.open(Path(scratch) / "start")
            tuned = tune(start, seed.cases("base"), replace(recipe, seed=number), Path(scratch))
            weights[str(fold)] = tuned.checkpoint("0")["network_weights"]
    write_trained(seed.folder / "base", planned, {"0": weights["0"]})
    write_trained(seed.folder / "twins.part", planned, weights)
    (seed.folder / "twins.part").replace(seed.folder / "twins")


def tune(model: ModelFolder, cases: Sequence[ReviewedCase], recipe: Recipe, work: Path) -> ModelFolder:
    """Fine-tune a model on cases that were reviewed completely."""
    return fine_tuned(model, prepare(model, cases, work / "preprocessed", None, lambda _: None), recipe, work)


# -- what a model makes of cases --------------------------------------------------------------------------------------


def predictor_of(model: ModelFolder) -> NNUNetPredictor:
    """Return the ordinary predictor of a model, with every patch twice in its batch.

    For a batch of one small patch PyTorch's CPU convolutions take longer than for two; the labels are the same.
    """
    cache = NetworkCache()
    with cache.engine(model, model.folds, CPU) as engine:
        network = engine._window.network
    network.register_forward_pre_hook(lambda _, given: (given[0].expand(2, *given[0].shape[1:]),))
    network.register_forward_hook(lambda _, __, output: output[:1])
    return NNUNetPredictor(model, cache)


def predictions(
    model: ModelFolder, cases: Iterable[ReviewedCase], *, measure: bool = True
) -> list[tuple[ReviewedCase, Prediction]]:
    """Predict as the server does, with mirroring, and measure how sure the model is; or quickly, and do not."""
    predictor = predictor_of(model)
    options = PredictOptions(PROFILES["accurate" if measure else "balanced"], device="cpu", measure=measure)
    return [(case, predictor.predict(case.images, options)) for case in cases]


def look(model: ModelFolder, cases: Iterable[ReviewedCase]) -> dict[str, Json]:
    """Return case id -> what a model makes of the case."""
    return {case.case_id: seen(case, prediction) for case, prediction in predictions(model, cases)}


def seen(case: ReviewedCase, prediction: Prediction) -> Json:
    """Return Dice, the voxels a clinician has to paint, and how sure the model was."""
    label = read_reviewed_label(case, prediction.labels.grid)
    found = {"dice": dice_of(prediction, label), "edited": int((label != prediction.labels.array_xyz).sum())}
    return found | ({"uncertainty": prediction.uncertainty.as_dict()} if prediction.uncertainty else {})


def dice_of(prediction: Prediction, label: Array) -> dict[str, float]:
    """Return the Dice of each structure with a label map."""
    score = score_case("", "", prediction.labels.array_xyz, prediction.names, label, STRUCTURES, tuple(STRUCTURES))
    return {name: round(value, 5) for name, value in score.dice.items()}


def mean_of(found: Json) -> float:
    """Return the mean Dice over the structures of a case."""
    return float(np.mean(list(found["dice"].values())))


def test_scores(model: ModelFolder, seed: Seed) -> Json:
    """Return case id -> mean Dice, without mirroring."""
    found = predictions(model, seed.cases("test"), measure=False)
    return {case.case_id: round(mean_of(seen(case, prediction)), 5) for case, prediction in found}


# -- the arms ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Situation:
    """What an arm may look at when it chooses.

    Attributes
    ----------
    waiting, taken : list of str
        Ids of the pool's cases without and with a label.
    seen : dict
        Case id -> what `look` returns, with the model as it is now; empty for an arm that does not ask.
    rng : random.Random
    """

    waiting: list[str]
    taken: list[str]
    seen: Json
    rng: random.Random

    def pool(self) -> Pool:
        """Return what `mshub.selection` works on."""
        return Pool(tuple(map(self._case, self.waiting)), tuple(map(self._case, self.taken)))

    def _case(self, name: str) -> Case:
        return Case(name, name, Uncertainty.from_dict(self.seen[name]["uncertainty"]) if self.seen else None)


Chooser = Callable[[Situation, int], list[str]]


def by_strategy(name: str) -> Chooser:
    """Return an arm that takes the first choices of a strategy."""

    def choose(situation: Situation, count: int) -> list[str]:
        ranked = STRATEGIES[name].ranked(situation.pool(), situation.rng)
        return [choice.image for choice in islice(ranked, count)]

    return choose


def foreground_random(situation: Situation, count: int) -> list[str]:
    """Draw without replacement, weighted by the predicted volume (Efraimidis and Spirakis, 2006)."""

    def key(name: str) -> float:
        return float(situation.rng.random() ** (1 / max(volume_ml(situation.seen[name]), 1e-6)))

    return sorted(situation.waiting, key=key, reverse=True)[:count]


def volume_ml(found: Json) -> float:
    """Return the predicted volume of all structures."""
    return float(sum(structure["volume_ml"] for structure in found["uncertainty"]["structures"].values()))


def oracle(situation: Situation, count: int) -> list[str]:
    """Take the cases that are predicted worst."""
    return sorted(situation.waiting, key=lambda name: mean_of(situation.seen[name]))[:count]


BLIND = "random"
"""The arm that need not look at the pool."""
ARMS: dict[str, Chooser] = {
    BLIND: by_strategy("random"),
    "foreground_random": foreground_random,
    **{name: by_strategy(name) for name in ("uncertainty", "class_stratified", "diversity", "hybrid", "worst_first")},
    "oracle": oracle,
}


def run_arm(seed: Seed, arm: str) -> None:
    """Run all rounds of an arm that are not done yet."""
    torch.set_num_threads(1)
    taken: list[str] = []
    for number in range(1, seed.sizes.rounds + 1):
        done = seed.done(f"{arm}-{number}") or one_round(seed, arm, number, taken)
        taken += done["chosen"]
    if arm == BLIND and not seed.done("ranking-tuned"):
        judge_measures(seed, f"{arm}-{seed.sizes.rounds}", "tuned")


def one_round(seed: Seed, arm: str, number: int, taken: list[str]) -> Json:
    """Choose, fine-tune and score."""
    began = time.process_time()
    before = seed.model(f"{arm}-{number - 1}" if number > 1 else "base")
    chosen, found = choose(seed, arm, number, before, taken)
    with tempfile.TemporaryDirectory() as scratch:
        labelled = [case for case in seed.cases("pool") if case.case_id in (*taken, *chosen)]
        start = seed.model("base") if seed.sizes.again else before
        tuned = tune(start, labelled, recipe_of(seed, number), Path(scratch))
        shutil.copytree(tuned.path, seed.folder / f"{arm}-{number}", dirs_exist_ok=True)
    result = {
        "seed": seed.number,
        "arm": arm,
        "round": number,
        "chosen": chosen,
        "edited": {name: found[name]["edited"] for name in chosen},
        "test": test_scores(seed.model(f"{arm}-{number}"), seed),
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    told = f"seed {seed.number}, {arm}, round {number}: {np.mean(list(result['test'].values())):.4f}"
    print(f"{told}, {result['cpu_seconds']} CPU s", flush=True)
    return seed.keep(f"{arm}-{number}", result)


def choose(seed: Seed, arm: str, number: int, model: ModelFolder, taken: list[str]) -> tuple[list[str], Json]:
    """Return the chosen cases, and what the model makes of them at least."""
    cases = {case.case_id: case for case in seed.cases("pool")}
    found = {} if arm == BLIND else (seed.done("pool") if number == 1 else look(model, cases.values())) or {}
    waiting = [name for name in cases if name not in taken]
    situation = Situation(waiting, taken, found, random.Random(1000 * seed.number + number))
    chosen = ARMS[arm](situation, seed.sizes.queries)
    return chosen, found or look(model, [cases[name] for name in chosen])


def recipe_of(seed: Seed, number: int) -> Recipe:
    """Return how a round fine-tunes: seeded alike for all arms."""
    sizes = seed.sizes
    options = {"learning_rate": sizes.learning_rate, "guard": sizes.guard, "seed": 100 * seed.number + number}
    return Recipe.from_options({"epochs": -(-sizes.iterations // EPOCH), "iterations": EPOCH, **options})


# -- beside the arms --------------------------------------------------------------------------------------------------


def begin(seed: Seed) -> None:
    """Do what all arms of a seed need: deal the cases, train the base model, look at the pool."""
    torch.set_num_threads(1)
    seed.folder.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    deal(seed)
    train_base(seed)
    if not seed.done("pool"):
        seed.keep("pool", look(seed.model("base"), seed.cases("pool")))
    if not seed.done("base"):
        seed.keep("base", {"test": test_scores(seed.model("base"), seed)})
    if not seed.done("ranking-base"):
        judge_measures(seed, "twins", "base")
    print(f"seed {seed.number} is ready: {time.process_time() - began:.0f} CPU s", flush=True)


def judge_measures(seed: Seed, model: str, name: str) -> None:
    """Keep what a model makes of the test cases, and how well it finds wrong labels among theirs."""
    found = predictions(seed.model(model), seed.cases("test"))
    wrong = [find_wrong_labels(found, random.Random(1000 * seed.number + draw)) for draw in range(seed.sizes.draws)]
    seed.keep(f"relabel-{name}", {"draws": wrong})
    seed.keep(f"ranking-{name}", {case.case_id: seen(case, prediction) for case, prediction in found})


WRONG_SHARE = 0.2


def find_wrong_labels(found: list[tuple[ReviewedCase, Prediction]], rng: random.Random) -> list[Json]:
    """Make some labels wrong; return the cases in the order in which ``relabel`` doubts them, and what is wrong."""
    chosen = rng.sample(range(len(found)), round(WRONG_SHARE * len(found)))
    wrong = {index: list(MISTAKES)[number % len(MISTAKES)] for number, index in enumerate(chosen)}
    cases = []
    for index, (case, prediction) in enumerate(found):
        label = read_reviewed_label(case, prediction.labels.grid)
        label = MISTAKES[wrong[index]](label, rng) if index in wrong else label
        agreed = dice_of(prediction, label)
        cases.append(Case(case.case_id, case.patient, prediction.uncertainty, label_dice=agreed))
    mistakes = {found[index][0].case_id: mistake for index, mistake in wrong.items()}
    ranked = STRATEGIES["relabel"].ranked(Pool((), tuple(cases)), rng)
    return [{"case": choice.image, "mistake": mistakes.get(choice.image)} for choice in ranked]


def exchanged(label: Array, rng: random.Random) -> Array:
    """Exchange the names of the two structures."""
    first, second = STRUCTURES.values()
    return np.where(label == first, second, np.where(label == second, first, label))


def missing(label: Array, rng: random.Random) -> Array:
    """Leave one structure out."""
    return np.where(label == rng.choice(list(STRUCTURES.values())), 0, label)


def eroded(label: Array, rng: random.Random) -> Array:
    """Take one layer of voxels away."""
    return np.where(ndimage.binary_erosion(label > 0), label, 0)


def dilated(label: Array, rng: random.Random) -> Array:
    """Add one layer of voxels."""
    grown = ndimage.grey_dilation(label, footprint=ndimage.generate_binary_structure(3, 1))
    return np.where(label > 0, label, grown)


def moved(label: Array, rng: random.Random) -> Array:
    """Move everything by three voxels along one axis."""
    return np.roll(label, rng.choice((-3, 3)), axis=rng.randrange(3))


MISTAKES: dict[str, Callable[[Array, random.Random], Array]] = {
    "exchanged names": exchanged,
    "missing structure": missing,
    "eroded by 1 voxel": eroded,
    "dilated by 1 voxel": dilated,
    "moved by 3 voxels": moved,
}


# -- the command line -------------------------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Active-learning strategies on hippocampus MR, over paired seeds.")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "hippocampus")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--processes", type=int, default=2)
    for name, default in asdict(Sizes()).items():
        how: Json = {"action": "store_true"} if isinstance(default, bool) else {"type": type(default)}
        if isinstance(default, tuple):
            how = {"type": int, "nargs": len(default)}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, **how)
    return parser.parse_args()


def same_sizes(out: Path, sizes: Sizes) -> None:
    """Refuse to mix results of different sizes in one folder."""
    out.mkdir(parents=True, exist_ok=True)
    path, asked = out / "sizes.json", json.loads(json.dumps(asdict(sizes)))
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else asked
    if known != asked:
        raise SystemExit(f"{out} holds results of {known}, asked for are {asked}. Choose another --out.")
    small_nnunet.write_json(path, asked)


def main() -> None:
    """Run the command line."""
    arguments = options()
    chosen = {name: getattr(arguments, name) for name in asdict(Sizes())}
    sizes = Sizes(**{**chosen, "patch": tuple(arguments.patch)})
    same_sizes(arguments.out, sizes)
    plan(arguments.data, arguments.out, sizes)
    seeds = [Seed(number, arguments.data, arguments.out, sizes) for number in arguments.seeds]
    count = arguments.processes
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        for first in range(0, len(seeds), count):  # so many seeds are whole before the next ones begin
            some = seeds[first : first + count]
            list(pool.map(begin, some))
            tasks = [(seed, arm) for seed in some for arm in arguments.arms]
            list(pool.map(run_arm, *zip(*tasks, strict=True)))
    print("done", flush=True)


if __name__ == "__main__":
    main()
