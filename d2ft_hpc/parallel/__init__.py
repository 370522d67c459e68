"""Models cut over ranks: which rank holds what, blocks cut by head, messages between tensor-parallel ranks, stages."""
