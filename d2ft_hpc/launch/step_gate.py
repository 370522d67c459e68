"""The gate that a rank's main thread passes between two steps, and that its watching thread can hold."""

from __future__ import annotations

import threading
from typing import Literal

Action = Literal["save", "stop", "give up"]

_FIRST_TO_LAST: tuple[Action, ...] = ("give up", "stop", "save")
"""Actions by priority: of several that are due at once only the first is done, since it includes the others or makes
them needless."""


class StepGate:
    """Lets all ranks act before the same step, though each passes its own gate without waiting for the others.

    Each rank's gate is held and answers how many steps it has let begin. What all then do, they do before the step of
    the largest answer: no rank has passed that boundary, and all will come to it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held = False
        self._begun = 0
        self._due: dict[Action, int] = {}

    def cross(self, steps_done: int) -> Action | None:
        """Called in the main thread: waits while the gate is held, and returns what is due before step
        `steps_done`."""
        with self._changed:
            while self._held:
                self._changed.wait()
            due = {action for action, step in self._due.items() if steps_done >= step}
            for action in due:
                del self._due[action]
            self._begun = steps_done + 1
        return next((action for action in _FIRST_TO_LAST if action in due), None)

    def hold(self) -> int:
        """No further step begins until `release`. Returns how many have begun."""
        with self._changed:
            self._held = True
            return self._begun

    def release(self, action: Action, step: int) -> None:
        """Lets the main thread go on; `action` is due before `step`."""
        with self._changed:
            self._due[action] = step
            self._held = False
            self._changed.notify_all()
