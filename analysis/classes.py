"""Accuracy by class and the confusion matrix of runs."""

import sys

from d2ft_hpc.figures import classes
from d2ft_hpc.figures.command import show


def main() -> int:
    return show(classes, __doc__, "classes.png")


if __name__ == "__main__":
    sys.exit(main())
