"""Fine-tuning of installed models as MONAI Label tasks."""

from lib.trainers.nnunet import NNUNetTrainTask, studies_of
from lib.trainers.trainings import Trainings

__all__ = ["NNUNetTrainTask", "Trainings", "studies_of"]
