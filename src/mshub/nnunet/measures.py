"""How sure the network is, measured in the pass that predicts: what nnU-Net averages away, and what it averages to.

nnU-Net averages the outputs of mirrored copies, of overlapping tiles and of folds. A `Measures` looks at each output
before it is averaged and counts how often the outputs agree; afterwards it looks at the probabilities where there is
something to be unsure of, inside the label and at its surface. It changes nothing of what is predicted.

Pairwise Dice without pairs of volumes: k label maps agree on a structure in all pairs of maps as often as single voxels
agree in all pairs of maps, summed up. Nearly all voxels are the same in every map and are counted once; only the others
are compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from mshub.nnunet.window_sums import classes_first
from mshub.uncertainty import StructureUncertainty, Uncertainty

VOXELS_AT_ONCE = 2**18
"""So many voxels of all classes are looked at together, which bounds the memory it takes."""
LARGE_TILE = 2**18
"""Of larger tiles, every second, third... slice is compared: mirrored copies agree there as they do between."""
COARSE = 4
"""Every so many voxels of a tile, along each axis, tell how much of it is structures."""
TINY = 1e-12


@dataclass(frozen=True)
class Heads:
    """What the channels of a network's output stand for.

    Attributes
    ----------
    names : tuple of str
        The structure of each channel, the background's channel left out.
    has_regions : bool
        Channels are regions that may overlap, each decided by itself; otherwise the largest of them decides, and the
        first is the background.
    are_probabilities : bool
        The output is averaged as probabilities, as nnU-Net v1 does, not as logits.
    """

    names: tuple[str, ...]
    has_regions: bool = False
    are_probabilities: bool = False

    def label_maps(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return label maps, axes (map, *spatial): one of all structures, or one of each region."""
        if self.has_regions:
            return (outputs > 0).to(torch.uint8)
        if outputs.stride(0) == 1:  # classes last in memory: their largest is found faster once they are turned
            outputs = classes_first(outputs[None])[0]
        winners: torch.Tensor = outputs.max(0, keepdim=True).indices  # faster than argmax on a CPU
        return winners.to(torch.uint8 if len(outputs) <= 256 else torch.int16)

    def probabilities(self, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the channels' probabilities, axes (channel, voxel), float32, and the entropies of the voxels."""
        if self.are_probabilities:
            chances = outputs.float()
            return chances, -(chances.clamp_min(TINY).log() * chances).sum(0)
        logits = outputs.float()
        logits -= logits.amax(0)
        chances = logits.exp()
        total = chances.sum(0)
        entropy = total.log() - (logits.mul_(chances)).sum(0) / total
        return chances.div_(total), entropy


class Votes:
    """Pairwise Dice of several label maps, structure by structure, added up over tiles."""

    def __init__(self, heads: Heads) -> None:
        self._heads = heads
        count = len(heads.names) + 1
        self._common, self._all = np.zeros(count), np.zeros(count)

    def count(self, maps: Sequence[torch.Tensor]) -> None:
        """Compare the label maps of one tile; of a single one nothing can be said."""
        if len(maps) < 2:
            return
        stacked = torch.stack(list(maps))  # (voter, map, *spatial)
        for index in range(stacked.shape[1]):
            common, total = self._compare(stacked[:, index].flatten(1))
            if self._heads.has_regions:
                self._common[index + 1] += common[1]
                self._all[index + 1] += total[1]
            else:
                self._common += common
                self._all += total

    def _compare(self, voters: torch.Tensor) -> tuple[Any, Any]:
        """Return, by label, in how many pairs of voters voxels have it in both, and in either counted twice."""
        bins = 2 if self._heads.has_regions else len(self._common)
        counted = partial(torch.bincount, minlength=bins)
        first, count = voters[0], len(voters)
        differs = (voters[1:] != first).any(0)
        same = counted(first[~differs].int())
        some = voters[:, differs]
        alike = torch.stack([(some == one).sum(0, dtype=torch.uint8) for one in some]) - 1  # with how many others
        labels = some.flatten().int()
        common = same * (count * (count - 1) // 2) + counted(labels, weights=alike.flatten().float()) / 2
        total = (count - 1) * (count * same + counted(labels))
        return common.cpu().numpy(), total.cpu().numpy()

    def dice(self) -> list[float | None]:
        """Return the Dice of each structure; None where no map has it or nothing was compared."""
        return [
            float(2 * common / total) if total else None
            for common, total in zip(self._common[1:], self._all[1:], strict=True)
        ]


class Measures:
    """Everything that is measured of one prediction; `SlidingWindow` tells it what happens.

    Parameters
    ----------
    heads : Heads
        What the network's outputs stand for.
    """

    def __init__(self, heads: Heads) -> None:
        self._heads = heads
        self._mirrors, self._folds = Votes(heads), Votes(heads)
        self._passes: list[torch.Tensor] = []
        self._fold_maps: list[torch.Tensor] = []
        self._deepest: torch.Tensor | None = None
        self._features: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []
        self._tile_before: tuple[list[torch.Tensor], Any] | None = None

    # -- while it is predicted ----------------------------------------------------------------------------------

    def deepest_features(self, features: torch.Tensor) -> None:
        """Take note of what the encoder made of a tile in the end, axes (batch, feature, *deepest grid)."""
        self._deepest = features

    def one_pass(self, output: torch.Tensor, passes: int, mirrored: tuple[int, ...] = ()) -> None:
        """Look at the output for one tile or a mirrored copy of it.

        Parameters
        ----------
        output : Tensor, axes (1, channel, *spatial)
            As mirrored as the copy is.
        passes : int
            How many there are of each tile.
        mirrored : tuple of int
            Along which axes of `output` the copy is mirrored.
        """
        if self._deepest is not None and not self._fold_maps:  # features of other folds cannot be compared
            self._keep_features(self._deepest, output[0])
        self._deepest = None
        if passes > 1:
            step = 1 + output[0, 0].numel() // LARGE_TILE
            first = (output.shape[2] - 1) % step if 2 in mirrored else 0  # the same slices of the tile
            maps = self._heads.label_maps(output[0, :, first::step])
            self._passes.append(maps.flip([axis - 1 for axis in mirrored]))

    def end_of_tile(self) -> None:
        """Compare the passes over a tile; on a GPU those over the tile before, which are there: it need not wait."""
        maps, self._passes = self._passes, []
        if maps and maps[0].is_cuda:
            made = torch.cuda.Event()
            made.record(torch.cuda.current_stream(maps[0].device))
            self._count_tile_before()
            self._tile_before = maps, made
        else:
            self._mirrors.count(maps)

    def _count_tile_before(self) -> None:
        """Compare the passes over a tile that waits for it, beside what the GPU does meanwhile."""
        if self._tile_before is not None:
            maps, made = self._tile_before
            with torch.cuda.stream(torch.cuda.Stream(maps[0].device)):
                made.wait()
                self._mirrors.count(maps)  # returns when it is done
            self._tile_before = None

    def end_of_fold(self, outputs: torch.Tensor) -> None:
        """Keep the label map of a fold; axes (channel, *spatial)."""
        self._count_tile_before()
        self._fold_maps.append(self._whole_maps(outputs, outputs.device))

    def _whole_maps(self, outputs: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return the label maps of an image, made on `device` some slices at a time, beside `outputs`."""
        parts = outputs.split(max(1, VOXELS_AT_ONCE // max(1, outputs[0, 0].numel())), dim=1)
        return torch.cat([self._heads.label_maps(part.to(device)).to(outputs.device) for part in parts], dim=1)

    def _keep_features(self, deepest: torch.Tensor, output: torch.Tensor) -> None:
        """Keep mean and spread of the features of a tile, and how much of it is structures; of the first pass only."""
        if self._passes:
            return
        deep = deepest[0].float().flatten(1)
        self._features.append(torch.cat([deep.mean(1), deep.std(1, correction=0)]))
        some = self._heads.label_maps(output[(slice(None), *[slice(None, None, COARSE)] * (output.ndim - 1))])
        self._weights.append(1 + (some != 0).any(0).sum())

    # -- afterwards ---------------------------------------------------------------------------------------------

    def result(self, outputs: torch.Tensor, device: torch.device, voxel_ml: float) -> Uncertainty:
        """Return what was measured.

        Parameters
        ----------
        outputs : Tensor, axes (channel, *spatial)
            What the prediction is made from: averaged over everything.
        device : torch.device
            Where to calculate.
        voxel_ml : float
            Volume of a voxel of `outputs`, in ml.
        """
        maps = self._fold_maps[0]
        if len(self._fold_maps) > 1:
            self._folds.count(self._fold_maps)
            maps = self._whole_maps(outputs, device)
        looked = _Probabilities(self._heads, outputs, maps, device)
        columns = (self._mirrors.dice(), self._folds.dice(), looked.soft_dice(), looked.entropies(), looked.voxels())
        structures = {
            name: StructureUncertainty(voxels * voxel_ml, mirror, fold, soft, entropy)
            for name, mirror, fold, soft, entropy, voxels in zip(self._heads.names, *columns, strict=True)
        }
        return Uncertainty(structures, looked.entropy_foreground, looked.entropy_border, self._embedding())

    def _embedding(self) -> tuple[float, ...]:
        if not self._features:
            return ()
        features, weights = (torch.stack(column).cpu().numpy() for column in (self._features, self._weights))
        mean = np.average(features, axis=0, weights=weights)
        return tuple(float(value) for value in mean)


class _Probabilities:
    """The probabilities inside a label and next to its surface, summed up."""

    def __init__(self, heads: Heads, outputs: torch.Tensor, maps: torch.Tensor, device: torch.device) -> None:
        self._heads, self._outputs, self._maps = heads, outputs.flatten(1), maps.flatten(1)
        structures = len(heads.names)
        self._expected, self._common, self._unsure, self._voxels = (np.zeros(structures) for _ in range(4))
        foreground = (maps != 0).any(0).flatten()
        border = torch.stack([_surface(one) for one in maps]).any(0).flatten()
        self._inside, self._edge = _Mean(), _Mean()
        look = self._look_at_regions if heads.has_regions else self._look_at_labels
        for chosen in torch.nonzero(foreground | border).flatten().split(VOXELS_AT_ONCE):
            entropy = look(self._outputs[:, chosen].to(device), self._maps[:, chosen].to(device))
            self._inside.add(entropy[foreground[chosen].to(device)])
            self._edge.add(entropy[border[chosen].to(device)])
        self.entropy_foreground, self.entropy_border = self._inside.value(), self._edge.value()

    def _look_at_labels(self, outputs: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        """Take in some voxels, axes (channel, voxel); returns their entropies, 0 to 1."""
        (probabilities, entropy), labels = self._heads.probabilities(outputs), maps[0].long()
        entropy /= float(np.log(len(outputs)))
        own = probabilities.gather(0, labels[None])[0]
        bins = partial(torch.bincount, minlength=len(outputs))
        self._add(probabilities.sum(1), bins(labels, weights=own), probabilities @ entropy, bins(labels), skip=1)
        return entropy

    def _look_at_regions(self, outputs: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        """As `_look_at_labels`, for channels that are decided each by itself."""
        outputs = outputs.float()
        probabilities = outputs.sigmoid()
        sides = torch.nn.functional.logsigmoid
        entropy = -(probabilities * sides(outputs) + (1 - probabilities) * sides(-outputs)) / float(np.log(2))
        common, unsure = (probabilities * maps).sum(1), (probabilities * entropy).sum(1)
        self._add(probabilities.sum(1), common, unsure, maps.sum(1), skip=0)
        return entropy.mean(0)

    def _add(
        self, expected: torch.Tensor, common: torch.Tensor, unsure: torch.Tensor, voxels: torch.Tensor, skip: int
    ) -> None:
        self._expected += expected[skip:].cpu().numpy()
        self._common += common[skip:].cpu().numpy()
        self._unsure += unsure[skip:].cpu().numpy()
        self._voxels += voxels[skip:].cpu().numpy()

    def soft_dice(self) -> list[float | None]:
        """Return the Dice of each structure's label with its probability; None for one that was not found."""
        return [
            float(2 * common / (expected + voxels)) if voxels else None
            for common, expected, voxels in zip(self._common, self._expected, self._voxels, strict=True)
        ]

    def entropies(self) -> list[float | None]:
        """Return each structure's mean entropy, voxels weighted by its probability; None for one not found."""
        return [
            float(unsure / expected) if voxels else None
            for unsure, expected, voxels in zip(self._unsure, self._expected, self._voxels, strict=True)
        ]

    def voxels(self) -> list[float]:
        """Return the number of voxels of each structure."""
        return [float(count) for count in self._voxels]


class _Mean:
    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def add(self, values: torch.Tensor) -> None:
        self._sum, self._count = self._sum + float(values.sum(dtype=torch.float64)), self._count + values.numel()

    def value(self) -> float | None:
        return self._sum / self._count if self._count else None


def _surface(labels: torch.Tensor) -> torch.Tensor:
    """Return which voxels have a neighbour (of 6 in 3-D) with another label."""
    found = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
    for axis in range(labels.ndim):
        length = labels.shape[axis] - 1
        differs = labels.narrow(axis, 1, length) != labels.narrow(axis, 0, length)
        found.narrow(axis, 0, length).logical_or_(differs)
        found.narrow(axis, 1, length).logical_or_(differs)
    return found
