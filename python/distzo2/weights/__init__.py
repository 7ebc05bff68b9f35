"""Units of weights: where they are stored, and what they have missed."""
