"""Contribution scores over the blocks and heads of the model."""

import sys

from d2ft_hpc.figures import scores
from d2ft_hpc.figures.command import show


def main() -> int:
    options = [
        ("--index", {"type": int, "default": -1, "help": "which measurement of the run (default: the last)"})
    ]
    return show(scores, __doc__, "scores.png", options)


if __name__ == "__main__":
    sys.exit(main())
