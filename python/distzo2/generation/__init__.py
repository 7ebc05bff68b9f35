"""Text that a model writes, outside of steps, and how well it answers."""
