"""Execution: the blocks of a model run the operations that a plan gives them."""
