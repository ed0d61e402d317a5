"""A conversation with a model: turns, and the cache that keeps what was already read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from oneblock.infer.generate import Request, Sequences
from oneblock.infer.llm import LLM


class Conversation:
    """Turns by the chat template; without one the model goes on with all that was written so far.

    Each turn feeds only what the cache does not hold yet. A reply that is cut short stays as far as it came.
    """

    def __init__(self, llm: LLM, request: Request, system: str | None = None):
        self.llm, self.request, self.system = llm, request, system
        self.templated = llm.tokenizer is not None and llm.tokenizer.chat_template is not None
        self._texts: Sequences | None = None
        self.reset()

    def reset(self) -> None:
        self.messages: list[dict[str, Any]] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self._ids: list[int] = []  # all so far, where there is no template

    def say(self, text: str) -> Iterator[str]:
        """The reply to one more message, piece by piece."""
        message = {"role": "user", "content": text}
        prompt = self._prompt([*self.messages, message])
        texts = self._ready(prompt)
        pieces: list[str] = []
        ids = list(prompt)
        try:
            for event in self.llm.run(texts, self.request, [self.llm.detokenizer(prompt)]):
                pieces.append(event.text)
                if event.id not in self.request.stop_ids:
                    ids.append(event.id)
                if event.text:
                    yield event.text
        finally:
            self.messages += [message, {"role": "assistant", "content": "".join(pieces)}]
            self._ids = ids

    def _prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        tokenizer = self.llm.tokenizer
        assert tokenizer is not None, "a conversation is made of text"
        if self.templated:
            return tokenizer.chat(messages)
        text = messages[-1]["content"]
        return self._ids + tokenizer.encode("\n" + text, bos=False) if self._ids else self.llm.encode(text)

    def _ready(self, prompt: list[int]) -> Sequences:
        """The batch of one, its cache kept as far as the prompt begins like the text before."""
        fresh = self.llm.texts([prompt], self.request)  # checks the prompt; reserves nothing yet
        if self._texts is None:
            self._texts = fresh
        else:
            self._texts.replace(prompt)
        return self._texts
