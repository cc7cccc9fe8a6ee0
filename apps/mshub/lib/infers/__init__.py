"""InferTasks: one per installed model."""

from lib.infers.nnunet import NNUNetInferTask, results_folder

__all__ = ["NNUNetInferTask", "results_folder"]
