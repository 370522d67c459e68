"""What loops tell the results file: steps of every rank, plans and scores, machine and model."""
