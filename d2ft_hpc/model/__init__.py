"""The model: how it is made, the map of its subnets, and its weights."""
