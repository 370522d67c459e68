"""Which samples of a batch train: every sample is scored by a cheap forward pass, then some are drawn by score."""

from d2ft_hpc.selection.draw import draw_by_score
from d2ft_hpc.selection.scorer import SampleScorer
from d2ft_hpc.selection.select import SampleSelection

__all__ = ["SampleScorer", "SampleSelection", "draw_by_score"]
