"""The commands that inspect architectures and their cost: models, compare, diff."""

from oneblock.lineage.commands import compare, diff, models, spec_of

__all__ = ["compare", "diff", "models", "spec_of"]
