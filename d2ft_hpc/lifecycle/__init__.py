"""The life of a run's plans, written once for every loop: `d2ft-hpc train`, `initialize`, `attach`.

    host (a training loop)                 controller                        what it calls
    ----------------------                 ----------                        -------------
    before each batch: before_batch(step)  is a plan due?
                                           scores                            ScoreSource.measure, or .collect after
                                                                             the batches that it observes, run dense
                                           make (rank 0; all get the same)   make_plan -> solve -> the planner
                                           put in force                      engine.check, executor.activate
                                           tell                              PlanListener: lines, results, phases
    at a checkpoint: settle(), state()     waits for a plan under way
    at a resume: restore(state)            the plan in force, and all that the next ones follow from

`context.PlanContext` is what plans of a run depend on, as data: settings, placement, costs, sizes. `controller` is the
table above; `make_plan` has its problem posed and solved; `background` solves while training goes on; `costs` is what
planners reckon with; `observed_scores` takes scores from training steps; `state` is what a checkpoint keeps. Nothing
here knows a loop, an engine's kind or a file of results: hosts give an engine, a source of scores and a listener.
"""

from d2ft_hpc.lifecycle.context import PlanContext
from d2ft_hpc.lifecycle.controller import PlanController, PlanListener
from d2ft_hpc.lifecycle.costs import PlanCosts
from d2ft_hpc.lifecycle.make_plan import make_plan
from d2ft_hpc.lifecycle.state import PlanState

__all__ = [
    "PlanContext",
    "PlanController",
    "PlanCosts",
    "PlanListener",
    "PlanState",
    "make_plan",
]
