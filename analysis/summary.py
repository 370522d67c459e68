"""Compute and time of runs, planned and measured."""

import sys

from d2ft_hpc.figures import summary
from d2ft_hpc.figures.command import show


def main() -> int:
    return show(summary, __doc__, "summary.png")


if __name__ == "__main__":
    sys.exit(main())
