"""Strategies that choose the next case to label."""

from lib.activelearning.random import Random

__all__ = ["Random"]
