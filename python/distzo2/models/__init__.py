"""Models out of checkpoints, in whatever format these are stored, and back; replay."""
