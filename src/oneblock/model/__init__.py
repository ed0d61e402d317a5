"""The one block and its parts: a `Spec` becomes a `Decoder`."""

from oneblock.model.decoder import Block, Decoder
from oneblock.model.init import init_weights
from oneblock.model.step import Cache, Dropout, Step

__all__ = ["Block", "Cache", "Decoder", "Dropout", "Step", "init_weights"]
