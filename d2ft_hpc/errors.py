"""Faults that the user can mend. The text of each is the whole message: what is wrong, where, and the fix."""

UNFINISHED = 75
"""Exit status (EX_TEMPFAIL) of a run that was stopped, hung or lost one of its processes: started again, it goes on."""

DIVERGED = 76
"""Exit status of a run whose loss or weights are not finite any more: started again, it would end so again."""


class D2ftError(Exception):
    """Base of every fault that ends a run with one message instead of a traceback."""

    exit_status = 1


class ConfigError(D2ftError):
    """A configuration key is unknown, of the wrong type or out of range."""


class LaunchError(D2ftError):
    """The launcher did not start what it promised, or the ranks cannot reach or agree with each other."""


class LostRankError(LaunchError):
    """A rank ended, hangs or cannot be reached any more after all ranks had met. The run did not fail by itself:
    started again, it goes on, which the exit status `UNFINISHED` says."""

    exit_status = UNFINISHED


class LostWorkerError(D2ftError):
    """A process that read data for a rank was killed. As with a lost rank, the run did not fail by itself."""

    exit_status = UNFINISHED


class DivergedError(D2ftError):
    """The loss or the weights are not finite any more. steps_done: steps before the one where it was seen."""

    exit_status = DIVERGED

    def __init__(self, text: str, steps_done: int | None = None) -> None:
        super().__init__(text)
        self.steps_done = steps_done


class LibraryError(D2ftError):
    """A library has removed or changed something undocumented that this package builds on."""


class DataError(D2ftError):
    """A data set is missing or does not have the form that its reader expects."""


class UnsupportedModelError(D2ftError):
    """The model belongs to none of the families in d2ft_hpc/families, or its blocks cannot be cut by head."""


class PlanError(D2ftError):
    """No plan satisfies the budgets, the scores are unusable, or a plan does not fit the model or engine."""


class ResultsError(D2ftError):
    """A results file cannot be written, or is not one of ours."""


class LostResultsError(ResultsError):
    """There is no results file that can be read and continued."""


class CheckpointError(D2ftError):
    """A checkpoint is missing, damaged or belongs to another run."""
