"""The optimizer: from losses to an update."""
