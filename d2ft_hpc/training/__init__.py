"""A training run: data, model, plan and engine together, every step recorded."""
