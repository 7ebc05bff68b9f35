"""Lines of data files become batches and losses."""
