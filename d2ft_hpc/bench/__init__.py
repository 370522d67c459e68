"""Measurements of the package's own parts: `d2ft-hpc bench`."""
