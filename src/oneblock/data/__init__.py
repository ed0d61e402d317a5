"""Documents to token shards to batches; batch n is a pure function of (seed, n)."""
