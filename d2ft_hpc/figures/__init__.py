"""Figures of runs, from their results files alone.

A module each; all have `measure(runs) -> dict`, numbers that can go into JSON, and `draw(numbers) -> Figure`.
`analysis/` has a script for each; `d2ft-hpc report` puts them all on one page.
"""
