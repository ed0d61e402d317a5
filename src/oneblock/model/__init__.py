"""The one block and its parts: a `Spec` becomes a `Decoder`."""

from oneblock.model.context import AttentionBackend, Cache, Dropout, ForwardContext
from oneblock.model.decoder import Block, Decoder
from oneblock.model.init import init_weights

__all__ = ["AttentionBackend", "Block", "Cache", "Decoder", "Dropout", "ForwardContext", "init_weights"]
