"""What plans do: block x head for each operation, over time, and by micro-batch."""

import sys

from d2ft_hpc.figures import plans
from d2ft_hpc.figures.command import show


def main() -> int:
    options = [("--plan", {"type": int, "help": "index of the plan to show (default: all)"})]
    return show(plans, __doc__, "plans.png", options)


if __name__ == "__main__":
    sys.exit(main())
