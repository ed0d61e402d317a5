"""The commands that look at architectures and what they cost: models, compare, diff."""

from oneblock.lineage.commands import compare, diff, models, spec_of

__all__ = ["compare", "diff", "models", "spec_of"]
