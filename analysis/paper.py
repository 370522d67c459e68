"""The claims of the paper (arXiv 2504.12471) beside what runs measured."""

import sys

from d2ft_hpc.figures import paper
from d2ft_hpc.figures.command import show


def main() -> int:
    return show(paper, __doc__, "paper.png")


if __name__ == "__main__":
    sys.exit(main())
