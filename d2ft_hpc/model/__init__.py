"""The model: a timm vision transformer, the map of its subnets, and its weights."""
