"""Text to ids and back."""

from oneblock.text.stream import Detokenizer
from oneblock.text.tokenizer import Tokenizer
from oneblock.text.train import byte_level, characters, train_bpe

__all__ = ["Detokenizer", "Tokenizer", "byte_level", "characters", "train_bpe"]
