"""When a reply ends, and what of its text may be shown before that is certain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

Finish = Literal["stop", "length"]

CONTEXT_OF_TEXT = 8  # prompt tokens that a reply's detokenizer sees first: a reply may begin in the middle of a word


class Detokenizer(Protocol):
    """Ids to text, one at a time (`Tokenizer.stream()`)."""

    def push(self, id: int) -> str: ...

    def flush(self) -> str: ...


class StopText:
    """Passes text on up to the first stop string; holds back an end that might become one.

    stop=["END"]: push("an EN") -> "an ", push("T") -> "ENT", push("END!") -> "" and `found`.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops, self.held, self.found = [stop for stop in stops if stop], "", False

    def push(self, text: str) -> str:
        if self.found or not text:
            return ""
        text, self.held = self.held + text, ""
        cuts = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if cuts:
            self.found = True
            return text[: min(cuts)]
        keep = len(text) - max((overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """The text is over: what was held back is no stop string."""
        text, self.held = self.held, ""
        return text


def overlap(text: str, stop: str) -> int:
    """How much of the text's end is the beginning of `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


class Reply:
    """One row's reply while it grows: its ids, its text, and why it ended."""

    def __init__(self, detokenizer: Detokenizer | None, limit: int, stop_ids: frozenset[int], stops: Sequence[str]):
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self._detokenizer, self._limit, self._stop_ids = detokenizer, limit, stop_ids
        self._text = StopText(stops)

    def push(self, id: int, last: bool = False) -> str:
        """One more token; the text that may be shown now. A stop id belongs to the ids, but has no text.

        `last`: nothing may follow it.
        """
        self.ids.append(id)
        text = ""
        if id in self._stop_ids:
            self.finish = "stop"
        elif self._detokenizer is not None:
            text = self._text.push(self._detokenizer.push(id))
        if last:
            self.finish = "stop"
        if self.finish is None and not self._text.found and len(self.ids) >= self._limit:
            self.finish = "length"
        if self.finish is not None and self._detokenizer is not None:
            text += self._text.push(self._detokenizer.flush())
            text += "" if self._text.found else self._text.flush()
        if self._text.found:
            self.finish = "stop"
        return text
