"""Text to ids to batches; batch n is a pure function of (seed, n)."""
