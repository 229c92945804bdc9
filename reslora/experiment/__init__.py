"""Experiments: several methods, learning rates and seeds in one run, and statistical comparison of the methods.

`compare_losses` compares methods of any trainer.
"""

from .losses import LossComparison, compare_losses
from .record import Ranking, Verdict

__all__ = ["LossComparison", "Ranking", "Verdict", "compare_losses"]
