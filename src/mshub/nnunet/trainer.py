"""Train one fold: nnU-Net's data loading, augmentation and loss, from all of a parent's weights, head included.

What nnU-Net offers for this loses the segmentation head, needs a GPU for a GPU's checkpoint and keeps the learning rate
of a training from scratch; the loop here is our own, its parts are nnU-Net's:

* every epoch is seeded by itself, and a checkpoint is written after an epoch every half minute, so a training that was
  killed goes on from there; on a CPU, where one process makes the batches, it ends with the weights it would have had,
  bit for bit, given the same number of threads;
* a step that runs out of memory is tried again with a smaller batch, then with smaller patches.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.nn import functional

from mshub.atomic_file import replacing
from mshub.errors import TrainingError
from mshub.nnunet.engine import load_network
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.label_warping import LabelFirstTransform
from mshub.nnunet.training_set import TrainingSet
from mshub.recipe import Recipe

logger = logging.getLogger(__name__)

CHECKPOINT_EVERY_S = 30.0
SCORED_STEPS = 5
"""Last steps of an epoch whose patches give the Dice that is shown as progress."""
GRADIENT_NORM = 12.0  # nnU-Net's
Weights = dict[str, torch.Tensor]


class Stopped(Exception):
    """The training was asked to end; its checkpoint is on disk."""


@dataclass(frozen=True)
class EpochReport:
    """What is known after an epoch.

    Attributes
    ----------
    epoch : int
        Epochs done.
    loss : float
        Mean over the epoch's steps.
    dice : float
        Mean foreground Dice over the last patches of the epoch, with augmentation: for a progress bar, not a quality.
    """

    epoch: int
    loss: float
    dice: float


@dataclass(frozen=True)
class Fit:
    """A trained fold.

    Attributes
    ----------
    weights : dict of str to Tensor
        On the CPU, complete.
    losses : list of float
        Mean loss per epoch.
    batch_size : int
    patch_size : tuple of int
        What was trained with, after out-of-memory steps.
    """

    weights: Weights
    losses: list[float]
    batch_size: int
    patch_size: tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """Batch and patch, the only things that are made smaller when memory runs out."""

    batch_size: int
    patch_size: tuple[int, ...]

    def smaller(self, strides: tuple[int, ...]) -> Setting:
        """Return the next smaller setting; `strides` is the total down-sampling per axis.

        Raises
        ------
        TrainingError
            Nothing can be made smaller.
        """
        if self.batch_size > 1:
            return replace(self, batch_size=self.batch_size // 2)
        room = [size / stride for size, stride in zip(self.patch_size, strides, strict=True)]
        axis = int(np.argmax(room))
        shrunk = int(room[axis] * 0.75) * strides[axis]
        if room[axis] < 3:
            raise TrainingError(
                f"The device ran out of memory with batches of one patch of {self.patch_size} voxels, and the network "
                "takes no smaller one. Train on a device with more memory, or on the CPU."
            )
        patch = tuple(shrunk if index == axis else size for index, size in enumerate(self.patch_size))
        return replace(self, patch_size=patch)


def train_fold(
    model: ModelFolder,
    fold: str,
    training_set: TrainingSet,
    recipe: Recipe,
    device: torch.device,
    work: Path,
    on_epoch: Callable[[EpochReport], None],
    is_stopped: Callable[[], bool],
) -> Fit:
    """Train one fold; go on from the checkpoint in `work` if there is one.

    Parameters
    ----------
    model : ModelFolder
        The parent: its plans, its mirror axes and the weights of `fold`, the segmentation head included.
    fold : str
        Such as ``0`` or ``all``.
    training_set : TrainingSet
        Every case of it is trained on.
    recipe : Recipe
    device : torch.device
    work : Path
        For the checkpoint and nnU-Net's log.
    on_epoch, is_stopped : callable
        Called after each epoch, before each step.

    Raises
    ------
    Stopped
        `is_stopped` said so; the checkpoint is written.
    TrainingError
        The loss is not finite, or memory does not suffice for the smallest batch and patch.
    """
    configuration = model.configuration_manager
    patch = tuple(int(size) for size in configuration.patch_size)
    setting = Setting(recipe.batch_size or configuration.batch_size, patch)
    strides = tuple(int(stride) for stride in np.prod(configuration.pool_op_kernel_sizes, axis=0))
    work.mkdir(parents=True, exist_ok=True)
    while True:
        run = _Run(model, fold, training_set, recipe, device, work, setting)
        try:
            return run.fit(on_epoch, is_stopped)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            setting = run.setting.smaller(strides)
            logger.warning("out of memory: going on with batches of %d, patches of %s", *vars(setting).values())
        finally:
            del run
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _is_out_of_memory(error: RuntimeError) -> bool:
    told = ("out of memory", "can't allocate memory")  # of the CUDA runtime, of the CPU
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in told)


@dataclass
class _State:
    """Everything a checkpoint holds, beside the optimiser."""

    epoch: int = 0
    losses: list[float] = field(default_factory=list)


class _Run:
    """One attempt with one setting."""

    def __init__(
        self,
        model: ModelFolder,
        fold: str,
        training_set: TrainingSet,
        recipe: Recipe,
        device: torch.device,
        work: Path,
        setting: Setting,
    ) -> None:
        self._recipe, self._device = recipe, device
        self._seed = (recipe.seed, fold)
        self._checkpoint = work / f"fold_{fold}.pt"
        stored = _load_checkpoint(self._checkpoint)
        if stored is not None:
            # A training that stepped down before it was killed need not run out of memory again.
            known = Setting(stored["setting"][0], tuple(stored["setting"][1]))
            setting = min(setting, known, key=lambda one: (one.batch_size, math.prod(one.patch_size)))
        self.setting = setting
        self._parent: Weights = model.checkpoint(fold)["network_weights"]
        _seed(*self._seed, -1)
        self._trainer = _nnunet_trainer(model, training_set, recipe, device, work, setting)
        network = load_network(model, self._parent, deep_supervision=self._trainer.enable_deep_supervision)
        self._network = self._laid_out(network)
        self._teacher = self._laid_out(load_network(model, self._parent)).eval() if recipe.distils else None
        self._optimiser = _optimiser(recipe, self._network)
        self._average = {name: value.detach().clone() for name, value in self._network.state_dict().items()}
        self._scaler = torch.amp.GradScaler("cuda") if device.type == "cuda" else None
        self._state = _State()
        if stored is not None:
            self._restore(stored)

    def fit(self, on_epoch: Callable[[EpochReport], None], is_stopped: Callable[[], bool]) -> Fit:
        saved = time.monotonic()
        with self._trainer.batches(self._seed, self._state.epoch) as batches:
            self._network.train()
            while self._state.epoch < self._recipe.epochs:
                if is_stopped():
                    self._save()
                    raise Stopped
                batches.start(self._state.epoch)
                report = self._epoch(batches, is_stopped)
                self._state.epoch += 1
                self._state.losses.append(report.loss)
                if time.monotonic() - saved >= CHECKPOINT_EVERY_S:
                    self._save()
                    saved = time.monotonic()
                on_epoch(report)
        self._save()
        return Fit(self._weights(), self._state.losses, self.setting.batch_size, self.setting.patch_size)

    def _epoch(self, batches: _Batches, is_stopped: Callable[[], bool]) -> EpochReport:
        losses, counts = [], torch.zeros(3, dtype=torch.float64)
        steps = self._recipe.iterations
        for index in range(steps):
            if is_stopped():
                raise Stopped
            step = self._state.epoch * steps + index
            for group in self._optimiser.param_groups:
                group["lr"] = self._recipe.learning_rate_at(step)
            batch = next(batches)
            loss, output, target = self._step(batch)
            losses.append(loss)
            self._update_average(step)
            if index >= steps - SCORED_STEPS:
                counts += self._trainer.overlap(output, target)
        shared, found, expected = counts.tolist()
        return EpochReport(
            self._state.epoch + 1, float(np.mean(losses)), 2 * shared / (found + expected) if found + expected else 1.0
        )

    def _step(self, batch: dict[str, Any]) -> tuple[float, torch.Tensor, torch.Tensor]:
        data = batch["data"].to(self._device, non_blocking=True)
        targets = batch["target"] if isinstance(batch["target"], list) else [batch["target"]]
        targets = [target.to(self._device, non_blocking=True) for target in targets]
        self._optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cuda") if self._device.type == "cuda" else contextlib.nullcontext():
            outputs = self._network(data)
            loss = self._trainer.loss(outputs, targets if isinstance(batch["target"], list) else targets[0])
            output = outputs[0] if isinstance(outputs, list | tuple) else outputs
            if self._teacher is not None:
                loss = loss + self._recipe.distillation * self._distillation(self._teacher, data, output, targets[0])
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"The training diverged in epoch {self._state.epoch + 1}: its loss is {value}. Expected a finite "
                f"number. How to fix: lower the learning rate (it is {self._recipe.learning_rate:g}), and look at the "
                "newest labels."
            )
        self._descend(loss)
        return value, output.detach(), targets[0]

    def _descend(self, loss: torch.Tensor) -> None:
        parameters = list(self._network.parameters())
        if self._scaler is None:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
            self._optimiser.step()
            return
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(self._optimiser)
        torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
        self._scaler.step(self._optimiser)
        self._scaler.update()

    def _distillation(
        self, teacher: torch.nn.Module, data: torch.Tensor, output: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """Return how far the network left its parent where the person did not (Li and Hoiem, arXiv 1606.09282).

        Voxels whose label differs from the parent's answer are what the person corrected: the parent says nothing
        there. Where nobody reviewed (``ignore``), it is the only one to ask.
        """
        with torch.no_grad():
            taught = teacher(data)
        return self._trainer.distance(output, taught, target)

    def _update_average(self, step: int) -> None:
        """Average the weights over the last steps; early steps count less while the average is young."""
        window = max(1.0, self._recipe.averaging * self._recipe.steps)
        keep = min(1 - 1 / window, (step + 1) / (step + 10))
        for name, value in self._network.state_dict().items():
            if value.dtype.is_floating_point:
                self._average[name].lerp_(value, 1 - keep)
            else:
                self._average[name].copy_(value)

    def _weights(self) -> Weights:
        """Return the averaged weights, mixed with the parent's where the recipe says so."""
        weights = {name: value.detach().cpu().contiguous().clone() for name, value in self._average.items()}
        if self._recipe.interpolates:
            for name, value in weights.items():
                if value.dtype.is_floating_point:
                    weights[name] = torch.lerp(self._parent[name].to(value.dtype), value, self._recipe.interpolation)
        return weights

    def _laid_out(self, network: torch.nn.Module) -> torch.nn.Module:
        """Move to the device; on a CPU, 3-D convolutions take half the time with the channels last."""
        is_3d = len(self.setting.patch_size) == 3
        if self._device.type == "cpu" and is_3d:
            return network.to(memory_format=torch.channels_last_3d)
        return network.to(self._device)

    def _save(self) -> None:
        stored = {
            "setting": [self.setting.batch_size, list(self.setting.patch_size)],
            "network": self._network.state_dict(),
            "average": self._average,
            "optimiser": self._optimiser.state_dict(),
            "scaler": self._scaler.state_dict() if self._scaler is not None else None,
            "epoch": self._state.epoch,
            "losses": self._state.losses,
        }
        with replacing(self._checkpoint) as stream:
            torch.save(stored, stream)

    def _restore(self, stored: dict[str, Any]) -> None:
        self._network.load_state_dict(stored["network"])
        for name, value in stored["average"].items():
            self._average[name].copy_(value)
        self._optimiser.load_state_dict(stored["optimiser"])
        if self._scaler is not None and stored["scaler"] is not None:
            self._scaler.load_state_dict(stored["scaler"])
        self._state = _State(stored["epoch"], list(stored["losses"]))
        logger.info("going on after epoch %d", self._state.epoch)


class _Batches:
    """nnU-Net's batches; seeded per epoch where they are made in this process."""

    def __init__(self, loader: Any, seed: tuple[int, str]) -> None:
        self._loader, self._given_seed = loader, seed

    def start(self, epoch: int) -> None:
        _seed(*self._given_seed, epoch)

    def __next__(self) -> dict[str, Any]:
        batch: dict[str, Any] = next(self._loader)
        return batch


class _Trainer(nnUNetTrainer):  # type: ignore[misc]
    """nnU-Net's trainer as the source of its loss, its augmentation and its data loaders; its own loop is not run."""

    training_set: TrainingSet
    mirror_axes: tuple[int, ...] | None

    @property
    def ignore_value(self) -> int:
        """Value of voxels nobody reviewed; -1, which no voxel has, where everything was reviewed."""
        value = self.label_manager.ignore_label
        return -1 if value is None else int(value)

    def _do_i_compile(self) -> bool:
        return False

    def do_split(self) -> tuple[list[str], list[str]]:
        """Train on every case: what judges the version was held out before, for good."""
        return list(self.training_set.cases), list(self.training_set.cases)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(  # noqa: N802 - nnU-Net's name
        self,
    ) -> tuple[Any, bool, Any, tuple[int, ...] | None]:
        """Return nnU-Net's settings with the parent's mirror axes: left and right may have labels of their own."""
        rotation, dummy_2d, initial_patch, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        return rotation, dummy_2d, initial_patch, self.mirror_axes

    @staticmethod
    def get_training_transforms(*args: Any, **options: Any) -> Any:
        """Return nnU-Net's augmentation, faster with many labels.

        Its blur would choose between two ways of rounding by their speed today.
        """
        augmentation = nnUNetTrainer.get_training_transforms(*args, **options)
        for place, transform in enumerate(augmentation.transforms):
            if type(transform) is SpatialTransform:
                augmentation.transforms[place] = LabelFirstTransform.like(transform)
            chosen = getattr(transform, "transform", transform)
            if hasattr(chosen, "benchmark"):
                chosen.benchmark = False
        return augmentation

    def print_to_log_file(self, *args: Any, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        """Keep nnU-Net's remarks for those who debug."""
        logger.debug("%s", " ".join(map(str, args)))

    @contextlib.contextmanager
    def batches(self, seed: tuple[int, str], epoch: int) -> Iterator[_Batches]:
        """Yield the training batches; processes that make them end with the block."""
        _seed(*seed, epoch)
        training, validation = self.get_dataloaders()
        try:
            yield _Batches(training, seed)
        finally:
            for loader in (training, validation):
                if hasattr(loader, "_finish"):
                    loader._finish()

    def overlap(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return counts of foreground voxels (shared, found, expected) in one batch, ``ignore`` left out."""
        if self.label_manager.has_regions:
            regions = output.shape[1]
            found, expected = output > 0, target[:, :regions] > 0
            return _counts(found & expected, found, expected)
        known = target[:, 0] != self.ignore_value
        found, expected = output.argmax(1) * known, target[:, 0] * known
        return _counts((found == expected) & (found > 0), found > 0, expected > 0)

    def distance(self, output: torch.Tensor, taught: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of `output` to the parent's probabilities, over voxels the person left as they were.

        Parameters
        ----------
        output, taught : Tensor, axes (batch, class, *space)
            Logits of the network and of its parent.
        target : Tensor, axes (batch, 1 or regions, *space)
            As nnU-Net's loss gets it.
        """
        if self.label_manager.has_regions:
            regions = output.shape[1]
            held = ((taught > 0) == (target[:, :regions] > 0)).float()
            each = functional.binary_cross_entropy_with_logits(output, taught.sigmoid(), reduction="none")
            return (each * held).sum() / held.sum().clamp(min=1)
        expected = target[:, 0].long()
        held = (taught.argmax(1) == expected) | (expected == self.ignore_value)
        each = -(taught.softmax(1) * functional.log_softmax(output.float(), 1)).sum(1)
        return (each * held).sum() / held.sum().clamp(min=1)


def _counts(*masks: torch.Tensor) -> torch.Tensor:
    return torch.stack([mask.sum() for mask in masks]).double().cpu()


def _nnunet_trainer(
    model: ModelFolder,
    training_set: TrainingSet,
    recipe: Recipe,
    device: torch.device,
    work: Path,
    setting: Setting,
) -> _Trainer:
    """Return nnU-Net's trainer, set up with the loss and the data of this training."""
    os.environ.update({name: str(work / "nnunet") for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")})
    if device.type == "cpu":
        os.environ.update(nnUNet_n_proc_DA="0")  # batches are made in this process: reproducible
    configuration = model.configuration
    plans = {**model.plans, "configurations": {**model.plans["configurations"]}, "continue_training": False}
    plans["configurations"][configuration] = {
        **model.configuration_manager.configuration,
        "batch_size": setting.batch_size,
        "patch_size": list(setting.patch_size),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = _Trainer(plans, configuration, 0, training_set.dataset, device)
    trainer.device = device  # nnU-Net takes the first GPU, whichever was asked for
    trainer.training_set = training_set
    trainer.mirror_axes = model.mirror_axes
    trainer.oversample_foreground_percent = recipe.foreground
    trainer.probabilistic_oversampling = True  # a fraction of a batch of one or two would be rounded away
    trainer.batch_size = setting.batch_size
    trainer.preprocessed_dataset_folder = str(training_set.folder)
    trainer.dataset_class = nnUNetDatasetBlosc2
    trainer.loss = trainer._build_loss()
    return trainer


def _optimiser(recipe: Recipe, network: torch.nn.Module) -> torch.optim.Optimizer:
    if recipe.optimiser == "adam":
        return torch.optim.AdamW(network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay, momentum=0.99, nesterov=True
    )


def _load_checkpoint(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    stored: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return stored


def _seed(seed: int, fold: str, epoch: int) -> None:
    """Seed every generator that nnU-Net's augmentation and torch draw from."""
    number = (seed * 1_000_003 + sum(map(ord, fold)) * 9_176 + (epoch + 1) * 7_919) % 2**31
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
