"""Strategies: which case to label next."""

from lib.activelearning.unlabelled import First, Random

__all__ = ["First", "Random"]
