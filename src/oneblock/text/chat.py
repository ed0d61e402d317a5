"""Conversations as ids: the template's control tokens work, and those that people write stay text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]


def plain(value: Any) -> Any:
    """What a template may see: texts, numbers, lists and dicts, and of everything else its name."""
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            return str.__str__(value)
        case Mapping():
            return {plain(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
    return f"<{type(value).__name__}>"


def without_none(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """`"content": None`, as some APIs write it, is the same as no content; templates know the latter alone."""
    return [{key: value for key, value in message.items() if value is not None} for message in plain(list(messages))]


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)


def unused(*values: Any) -> str:
    """A private character that occurs in none of the values, not even as an escape of JSON."""
    texts = [text for value in values for text in strings(value)]
    marks = (chr(code) for code in range(0xE000, 0xF900))
    return next(m for m in marks if not any(m in text or f"\\u{ord(m):04x}" in text for text in texts))


class Guard:
    """Breaks up control tokens that texts spell by a mark, which a template carries along unseen.

    Also a text's end that is the beginning of one, which the next text might complete: `<|im_` and `end|>`.
    """

    def __init__(self, names: Collection[str], mark: str):
        self.mark = mark
        self._names = sorted(names, key=len, reverse=True)
        self._heads = {name[:size] for name in names for size in range(1, len(name))}
        self._longest = max(map(len, self._heads), default=0)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, Mapping):
            return {self(key): self(item) for key, item in value.items()}
        return [self(item) for item in value] if isinstance(value, list) else value

    def _text(self, text: str) -> str:
        for name in self._names:
            if name in text:
                text = text.replace(name, name[:1] + self.mark + name[1:])
        end = len(text.rstrip())  # templates strip
        for start in range(max(0, end - self._longest), end):
            if text[start:end] in self._heads:
                return text[: start + 1] + self.mark + text[start + 1 :]
        return text
