"""Weights and files: reading, mapping, writing, replay."""
