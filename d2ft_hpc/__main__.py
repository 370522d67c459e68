"""The command line, as `d2ft-hpc` and for launchers that start modules as `python -m d2ft_hpc`."""

import sys

from d2ft_hpc import early_signals


def main() -> int:
    """`cli.main`, which must not miss a signal while it is imported."""
    early_signals.hold()
    from d2ft_hpc import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
