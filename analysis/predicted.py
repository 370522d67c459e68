"""What plans promised against what was measured: compute and time."""

import sys

from d2ft_hpc.figures import predicted
from d2ft_hpc.figures.command import show


def main() -> int:
    return show(predicted, __doc__, "predicted.png")


if __name__ == "__main__":
    sys.exit(main())
