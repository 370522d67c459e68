"""How evenly the work is spread: compute and its variance over ranks, and each rank's time by phase."""

import sys

from d2ft_hpc.figures import workload
from d2ft_hpc.figures.command import show


def main() -> int:
    return show(workload, __doc__, "workload.png")


if __name__ == "__main__":
    sys.exit(main())
