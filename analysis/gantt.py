"""What every rank did during some steps, phase after phase."""

import sys
from typing import Any

from d2ft_hpc.figures import gantt
from d2ft_hpc.figures.command import show


def main() -> int:
    options: list[tuple[str, dict[str, Any]]] = [
        ("--first", {"type": int, "help": "first step to show (default: the middle of the run)"}),
        ("--steps", {"type": int, "default": 4, "help": "how many steps"}),
    ]
    return show(gantt, __doc__, "gantt.png", options)


if __name__ == "__main__":
    sys.exit(main())
