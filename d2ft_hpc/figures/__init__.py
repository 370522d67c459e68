"""Figures of runs, from their results files alone.

A module each; all have `measure(runs) -> dict`, numbers that can go into JSON, and `draw(numbers) -> Figure`.
`d2ft-hpc figure NAME` makes one; `d2ft-hpc report` puts them all on one page.
"""
