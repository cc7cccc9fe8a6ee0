"""Active learning: which case to label next, what is computed for it while nobody needs the server, and batches."""

from lib.activelearning.active_learning import ActiveLearning

__all__ = ["ActiveLearning"]
