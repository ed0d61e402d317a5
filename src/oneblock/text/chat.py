"""Chat templates over message text that cannot become control tokens, whatever the template does to it.

A conversation is rendered twice: as it is, and with the characters that spell control tokens replaced, inside message
text, by private-use stand-ins. In the second rendering control tokens can come from the template alone; where both
agree (stand-ins mapped back), it tells for every character whether the template or a message wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oneblock.errors import OneblockError
from oneblock.text.chat_template import renderer

PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))
RESERVED = re.compile("[\ue000-\uf8ff\U000f0000-\U000ffffd]|\\\\u[eEfF]")  # text that stand-ins must avoid
ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")  # how JSON in ASCII writes a private-use character
IDENTIFIER = re.compile(r"[\w-]+")
KINDS = ("role", "type")  # keys whose values templates compare, or put between `<|` and `|>`


def json_value(value: Any) -> Any:
    """The JSON value for what a caller gave; any other object becomes `<ClassName>`."""
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            return str.__str__(value)
        case Mapping():
            return {str(key): json_value(item) for key, item in value.items()}
        case list() | tuple():
            return [json_value(item) for item in value]
    return f"<{type(value).__name__}>"


def drop_none(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages without None fields: some APIs write `"content": None` where templates expect no content."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def iterate_strings(value: Any) -> Iterator[str]:
    """Every string of a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from iterate_strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from iterate_strings(item)


@dataclass(frozen=True)
class Conversation:
    """The values of one rendering: `constants` (bos_token, ...) are trusted, the rest is message text."""

    template: str
    messages: list[dict[str, Any]]
    tools: Any
    options: dict[str, Any]
    constants: dict[str, str]

    def values(self) -> dict[str, Any]:
        return self.constants | {"messages": self.messages, "tools": self.tools} | self.options


class ContentMask:
    """Replaces characters of control tokens by private-use stand-ins, one to one, and maps them back.

    `names`: the control tokens. `assistant_names`: those that assistant messages may write (`<think>`). `used`: text
    whose private-use characters cannot be stand-ins.
    """

    def __init__(self, names: Collection[str], assistant_names: Collection[str], used: str = ""):
        taken = set(used) | {chr(int(code, 16)) for code in ESCAPE.findall(used)}
        free = (code for code in PRIVATE_USE if chr(code) not in taken)
        variants = {variant for c in "".join(names) for variant in (c, c.lower(), c.upper()) if len(variant) == 1}
        # JSON escapes quotes and backslashes; their stand-ins would not be escaped.
        characters = sorted(c for c in variants if not c.isspace() and c.isprintable() and c not in '"\\')
        self._all = {ord(c): next(free) for c in characters}
        heads = {variant for name in names for c in name[:1] for variant in (c, c.lower(), c.upper())}
        self._heads = {code: stand_in for code, stand_in in self._all.items() if chr(code) in heads}
        self._originals = {stand_in: chr(code) for code, stand_in in self._all.items()}
        self._assistant = re.compile(f"({any_name(assistant_names)})") if assistant_names else None
        self._names = {name: chr(next(free)) for name in names if len(name) > 2 and not IDENTIFIER.fullmatch(name)}
        self._name_of = {ord(stand_in): name for name, stand_in in self._names.items()}
        self._literals = re.compile(any_name(self._names) or "(?!)")

    def mask_content(self, conversation: Conversation, letters: bool) -> dict[str, Any]:
        """The values with stand-ins in message text for every character of control tokens, or for the first ones.

        Templates compare strings of tools and options ("function", "/think"), which keep all but the first ones.
        """
        table = self._all if letters else self._heads
        messages = [
            self._mask(message, table, self._assistant if message.get("role") == "assistant" else None)
            for message in conversation.messages
        ]
        tools, options = (self._mask(value, self._heads, None) for value in (conversation.tools, conversation.options))
        return conversation.constants | {"messages": messages, "tools": tools} | options

    def mask_literals(self, value: Any) -> Any:
        """The template or its values with one stand-in for each control token that is spelled out."""
        if isinstance(value, str):
            return self._literals.sub(lambda name: self._names[name[0]], value)
        if isinstance(value, dict):
            return {key: self.mask_literals(item) for key, item in value.items()}
        return [self.mask_literals(item) for item in value] if isinstance(value, list) else value

    def restore_literals(self, text: str) -> str:
        return text.translate(self._name_of)

    def _mask(self, value: Any, table: dict[int, int], keep: re.Pattern[str] | None) -> Any:
        if isinstance(value, str):
            if keep is None:
                return value.translate(table)
            return "".join(part if i % 2 else part.translate(table) for i, part in enumerate(keep.split(value)))
        if isinstance(value, dict):
            return {
                key if IDENTIFIER.fullmatch(key) else key.translate(self._heads): item
                if key in KINDS and isinstance(item, str) and IDENTIFIER.fullmatch(item)
                else self._mask(item, table, keep)
                for key, item in value.items()
            }
        return [self._mask(item, table, keep) for item in value] if isinstance(value, list) else value

    def restore(self, text: str) -> str:
        """The text with the original characters in place of the stand-ins, also of those that JSON escaped."""
        if "\\u" in text:
            text = ESCAPE.sub(self._unescape, text)
        return text.translate(self._originals)

    def _unescape(self, escape: re.Match[str]) -> str:
        original = self._originals.get(int(escape[1], 16))
        if original is None:
            return escape[0]
        return original if original.isascii() else f"\\u{ord(original):04x}"


def any_name(names: Iterable[str]) -> str:
    """A pattern of any of the names, longest first."""
    return "|".join(map(re.escape, sorted(names, key=len, reverse=True)))


def render_masked(conversation: Conversation, mask: ContentMask, control: re.Pattern[str]) -> str:
    """The rendered conversation in which every match of `control` was written by the template.

    Message text is masked as far as it must be: `mask.restore` maps the result to readable text. OneblockError where
    the template fails, or builds control tokens from message text.
    """
    template = conversation.template
    raw, opaque = renderer().render(template, [conversation.values(), mask.mask_content(conversation, letters=True)])
    if isinstance(raw, OneblockError):
        raise raw
    if isinstance(opaque, str) and mask.restore(opaque) == raw:
        return opaque
    # The template inspects or transforms the text: keep its letters, which `|lower` and comparisons need.
    values = mask.mask_literals(mask.mask_content(conversation, letters=False))
    [masked] = renderer().render(mask.mask_literals(template), [values])
    if isinstance(masked, OneblockError):
        raise masked
    composed = control.findall(masked)  # from parts: `'<|' + message.role + '|>'`, but also with `message.content`
    masked = mask.restore_literals(masked)
    names = control.findall(masked)
    if composed and (isinstance(opaque, OneblockError) or control.findall(opaque) != names):
        raise OneblockError(
            f"the chat template composes the control token {composed[0]} from message text: remove it from the messages"
        )
    # Equal control tokens: the messages add none, so the exact text can be used (`|e` writes &lt; for < only there).
    return raw if mask.restore(masked) != raw and control.findall(raw) == names else masked
