"""Training loss and accuracy of runs against measured training time (steps, scoring and planning)."""

import sys

from d2ft_hpc.figures import learning
from d2ft_hpc.figures.command import show


def main() -> int:
    options = [
        ("--smooth", {"type": int, "default": 20, "help": "most steps in the moving average of the loss"})
    ]
    return show(learning, __doc__, "learning.png", options)


if __name__ == "__main__":
    sys.exit(main())
