"""What is measured and predicted, and not needed to train."""
