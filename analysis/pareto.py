"""Accuracy of many runs against measured time, compute and bytes, dense runs and dense at equal compute among them."""

import sys

from d2ft_hpc.figures import pareto
from d2ft_hpc.figures.command import show


def main() -> int:
    return show(pareto, __doc__, "pareto.png")


if __name__ == "__main__":
    sys.exit(main())
