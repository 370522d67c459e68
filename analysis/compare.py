"""Configurations against each other over seeds, with the significance of the differences."""

import sys

from d2ft_hpc.figures import compare
from d2ft_hpc.figures.command import show


def main() -> int:
    return show(compare, __doc__, "compare.png")


if __name__ == "__main__":
    sys.exit(main())
