"""Stop conditions, and the text of a reply that is final while it is generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from oneblock.infer.structured_output import Ending, GrammarMatcher
from oneblock.text.stream import Detokenizer

FinishReason = Literal["stop", "length"]


class StopStrings:
    """Passes text on up to the first stop string; holds back a suffix that may become one.

    stop=["END"]: push("an EN") -> "an ", push("T") -> "ENT", push("END!") -> "" and `matched`.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops, self.pending, self.matched = [stop for stop in stops if stop], "", False

    def push(self, text: str) -> str:
        """Add text; return the part that is final."""
        if self.matched or not text:
            return ""
        text, self.pending = self.pending + text, ""
        matches = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if matches:
            self.matched = True
            return text[: min(matches)]
        end = len(text) - max((overlap(text, stop) for stop in self.stops), default=0)
        self.pending = text[end:]
        return text[:end]

    def flush(self) -> str:
        """Return the text that is held back, once no more text follows."""
        text, self.pending = self.pending, ""
        return text


def overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of the text that is a proper prefix of `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


class Reply:
    """The generated tokens of one sequence, their text, the position in a grammar, and the finish reason."""

    def __init__(
        self,
        detokenizer: Detokenizer | None,
        limit: int,
        stop_ids: frozenset[int],
        stops: Sequence[str],
        matcher: GrammarMatcher | None = None,
    ):
        self.ids: list[int] = []
        self.matcher = matcher
        self.finish_reason: FinishReason | None = None
        self._detokenizer, self._limit, self._stop_ids = detokenizer, limit, stop_ids
        self._text = StopStrings(stops)

    @property
    def remaining_tokens(self) -> int:
        return self._limit - len(self.ids)

    def push(self, id: int) -> str:
        """Append a token; return the text that became final. A token that ends the reply before it has no text."""
        ending = Ending.NONE if self.matcher is None else self.matcher.accept_token(id)
        self.ids.append(id)
        text = ""
        if id in self._stop_ids or ending == Ending.BEFORE_TOKEN:
            self.finish_reason = "stop"
        elif self._detokenizer is not None:
            text = self._text.push(self._detokenizer.push(id))
        if ending == Ending.AFTER_TOKEN:
            self.finish_reason = "stop"
        if self.finish_reason is None and not self._text.matched and self.remaining_tokens <= 0:
            self.finish_reason = "length"
        if self.finish_reason is not None and self._detokenizer is not None:
            text += self._text.push(self._detokenizer.flush())
            text += "" if self._text.matched else self._text.flush()
        if self._text.matched:
            self.finish_reason = "stop"
        return text
