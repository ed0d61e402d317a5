"""Data, tensor, context, expert and pipeline parallelism as transformations of a finished model."""
