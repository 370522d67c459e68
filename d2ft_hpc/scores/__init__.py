"""Contribution scores: what a subnet gives to a micro-batch (arXiv 2504.12471, section 3)."""

from d2ft_hpc.scores.gradient_scores import gradient_scores
from d2ft_hpc.scores.magnitude import scores_of_weights
from d2ft_hpc.scores.row_scores import Scores

__all__ = ["Scores", "gradient_scores", "scores_of_weights"]
