"""Data sets, the order in which micro-batches are drawn, and the loaders that read them."""
