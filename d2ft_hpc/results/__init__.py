"""Everything a run computed, in one HDF5 file.

`schema` says what is in it, `ResultsWriter` writes it while the run goes on, and `open` reads it: during the run,
after a kill, or years later.
"""

from d2ft_hpc.results.reader import RunResults, open_run
from d2ft_hpc.results.reader import open_run as open
from d2ft_hpc.results.writer import ResultsWriter

__all__ = ["ResultsWriter", "RunResults", "open", "open_run"]
