"""`python -m d2ft_hpc`: the command line, for launchers that start modules."""

import sys

from d2ft_hpc.cli import main

sys.exit(main())
