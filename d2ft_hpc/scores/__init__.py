"""Contribution scores: what a subnet gives to a micro-batch (arXiv 2504.12471, section 3)."""

from d2ft_hpc.scores.fisher import fisher_information
from d2ft_hpc.scores.magnitude import weight_magnitude

__all__ = ["fisher_information", "weight_magnitude"]
