"""A conversation: messages, and a KV cache that keeps the common prefix from turn to turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from oneblock.errors import OneblockError
from oneblock.infer.generate import Request, Sequences
from oneblock.infer.llm import LLM


class Conversation:
    """Turns in the chat template; without one the model continues everything written so far.

    Each turn prefills only what the cache lacks. An interrupted reply stays in the conversation as far as it came.
    """

    def __init__(self, llm: LLM, request: Request, system: str | None = None):
        self.llm, self.request, self.system = llm, request, system
        self.has_template = llm.tokenizer is not None and llm.tokenizer.chat_template is not None
        if system is not None and not self.has_template:
            raise OneblockError("the model has no chat template, so a system prompt has no effect: leave --system out")
        self._sequences: Sequences | None = None
        self.reset()

    def reset(self) -> None:
        """Drop all messages but the system prompt."""
        self.messages: list[dict[str, Any]] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self._ids: list[int] = []  # the whole conversation, without a template

    def stream_reply(self, text: str) -> Iterator[str]:
        """Add a user message; yield the reply as pieces of text."""
        message = {"role": "user", "content": text}
        prompt = self._encode_prompt([*self.messages, message])
        sequences = self._reuse_cache(prompt)
        pieces: list[str] = []
        ids = list(prompt)
        try:
            for output in self.llm.generate_tokens(sequences, self.request):
                pieces.append(output.text)
                if output.id not in self.request.stop_ids:
                    ids.append(output.id)
                if output.text:
                    yield output.text
        finally:
            self.messages += [message, {"role": "assistant", "content": "".join(pieces)}]
            self._ids = ids

    def _encode_prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        tokenizer = self.llm.tokenizer
        assert tokenizer is not None, "a conversation needs a tokenizer"
        if self.has_template:
            return tokenizer.chat(messages)
        text = messages[-1]["content"]
        return self._ids + tokenizer.encode("\n" + text, bos=False) if self._ids else self.llm.encode(text)

    def _reuse_cache(self, prompt: list[int]) -> Sequences:
        """The batch of one; its cache keeps the prefix that the prompt shares with the turn before."""
        fresh = self.llm.allocate_sequences([prompt], self.request)  # checks the prompt; memory is reserved later
        if self._sequences is None:
            self._sequences = fresh
        else:
            self._sequences.replace_prompt(prompt)
        return self._sequences
