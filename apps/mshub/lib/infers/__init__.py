"""InferTasks: one per installed model."""

from lib.infers.nnunet import NNUNetInferTask

__all__ = ["NNUNetInferTask"]
