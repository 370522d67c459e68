"""All planners. To add one, write its file and name it here."""

from __future__ import annotations

from d2ft_hpc.planning.baselines import LAST_BLOCKS, PRUNING, RANDOM, ROUTING, STOCHASTIC_DEPTH
from d2ft_hpc.planning.dense import DENSE
from d2ft_hpc.planning.depth import DEPTH
from d2ft_hpc.planning.joint import JOINT
from d2ft_hpc.planning.makespan import MAKESPAN
from d2ft_hpc.planning.paper import PAPER
from d2ft_hpc.planning.planner import Planner
from d2ft_hpc.planning.samples import SAMPLES
from d2ft_hpc.planning.static import STATIC
from d2ft_hpc.planning.tokens import TOKENS

PLANNERS: dict[str, Planner] = {
    planner.name: planner
    for planner in (
        TOKENS,
        DENSE,
        SAMPLES,
        PAPER,
        JOINT,
        MAKESPAN,
        STATIC,
        DEPTH,
        RANDOM,
        LAST_BLOCKS,
        STOCHASTIC_DEPTH,
        PRUNING,
        ROUTING,
    )
}
"""By name, in the order in which messages list them."""
