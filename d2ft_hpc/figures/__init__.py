"""Figures of runs, from their results files alone.

Each figure is a module with `measure(runs) -> dict`, which returns numbers for JSON, and `draw(numbers) -> Figure`.
`d2ft-hpc figure NAME` makes one; `d2ft-hpc report` puts them all on one page.
"""
