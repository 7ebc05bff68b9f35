"""The passes over the weights."""
