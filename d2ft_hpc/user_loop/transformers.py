"""Plans in Hugging Face's `Trainer`, which has no place of its own for what its checkpoints are to carry beside."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from d2ft_hpc.user_loop.planned_loop import PlannedLoop


class D2ftCallback(TrainerCallback, ExportableState):
    """`Trainer(model, ..., callbacks=[D2ftCallback(d2ft)])`, where `d2ft = d2ft_hpc.attach(model, ...)`.

    Plan and replanning go with the trainer's checkpoints, and evaluations that have an `eval_accuracy` are recorded;
    the trainer needs nothing else to train under plans.

    Several ranks on CPUs resume with transformers 5.24 or newer: older trainers, with or without this callback, read
    the optimiser's state to a device "cpu:0", which torch does not know. On GPUs and in one process all versions do.
    """

    def __init__(self, d2ft: PlannedLoop) -> None:
        self.d2ft = d2ft

    def state(self) -> dict[str, Any]:
        """For a checkpoint's trainer_state.json."""
        return {"args": {}, "attributes": self.d2ft.state_dict()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if saved is not None:
            self.d2ft.load_state_dict(saved["attributes"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics = kwargs.get("metrics") or {}
        if "eval_accuracy" in metrics:
            self.d2ft.record.evaluation(metrics["eval_accuracy"], metrics["eval_loss"])
