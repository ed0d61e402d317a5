"""One tokenizer for every file format of the lineage: text to ids, ids to text, conversations to ids."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from oneblock.errors import OneblockError
from oneblock.text import chat, files
from oneblock.text.stream import Detokenizer, spelling


class Tokenizer:
    """A `tokenizers` object with its folder's habits: what begins and ends a text, the chat template.

    Text never becomes control tokens unless asked: `<|eot_id|>` typed by a user is eight ordinary letters and signs.
    """

    def __init__(self, backend: Backend, config: Mapping[str, Any] | None = None, chat_template: str | None = None):
        self.backend, self.config = backend, dict(config or {})
        self.chat_template = chat_template
        self._lock = threading.Lock()  # around the backend's switch for control tokens
        self._spelling = spelling(backend)
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a folder, or one file of it: tokenizer.json, SentencePiece, vocabulary and merges, tiktoken ranks."""
        found = files.read(Path(path))
        return cls(found.backend, found.config, found.chat_template)

    @staticmethod
    def find(folder: str | Path) -> Path | None:
        """The file that `load` would read."""
        return files.find(Path(folder))

    def save(self, folder: str | Path) -> None:
        """tokenizer.json, tokenizer_config.json and the chat template, as Hugging Face folders have them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self.backend.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | self.config
        config.pop("chat_template", None)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8", newline="")

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size:,} ids, {len(self.special)} of them control tokens)"

    # ------------------------------------------------------------------ what there is

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id: the rows an embedding needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def special(self) -> dict[str, int]:
        """The control tokens and their ids."""
        return {token.content: id for id, token in self.backend.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def bos_id(self) -> int | None:
        """What begins a text."""
        return self._id("bos_token")

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """What ends a text, as far as the tokenizer's own files say; `generation_config.json` may know more."""
        id = self._id("eos_token")
        return () if id is None else (id,)

    def _id(self, role: str) -> int | None:
        token = self._token(role)
        return None if token is None else self.backend.token_to_id(token)

    def _token(self, role: str) -> str | None:
        value = self.config.get(role)
        return value.get("content") if isinstance(value, dict) else value

    # ------------------------------------------------------------------ text to ids

    def encode(self, text: str, bos: bool | None = None, special: bool = False) -> list[int]:
        """Ids of a text.

        `bos` True or False: with or without the token that begins a text; None: as the tokenizer's file has it.
        `special`: control tokens written in the text become their ids.
        """
        return self.encode_batch([text], bos, special)[0]

    def encode_batch(self, texts: Sequence[str], bos: bool | None = None, special: bool = False) -> list[list[int]]:
        """`encode` for several texts at once, on every core."""
        if bos and self.bos_id is None:
            raise OneblockError("the tokenizer has no token that begins a text: leave bos out")
        encoded = self._encode(texts, special, add=bos is None)
        return [[self.bos_id, *ids] for ids in encoded] if bos else encoded  # pyright: ignore[reportReturnType]

    def _encode(self, texts: Sequence[str], special: bool, add: bool) -> list[list[int]]:
        with self._lock:
            self.backend.encode_special_tokens = not special
            try:
                return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=add)]
            except (TypeError, UnicodeEncodeError):
                raise OneblockError(_why(texts)) from None
            finally:
                self.backend.encode_special_tokens = True

    # ------------------------------------------------------------------ ids to text

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids. Bytes that are no UTF-8 become U+FFFD; ids outside the vocabulary are left out."""
        stream = self.stream(skip_special)
        return "".join(stream.push(id) for id in ids) + stream.flush()

    def stream(self, skip_special: bool = True) -> Detokenizer:
        """Ids to text one by one."""
        hidden = frozenset(self.special.values()) if skip_special else frozenset()
        return Detokenizer(self.backend, self._spelling, hidden)

    # ------------------------------------------------------------------ conversations

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        generation_prompt: bool = True,
        **values: Any,
    ) -> str:
        """A conversation `[{"role": "user", "content": ".."}, ..]` as the text of the chat template."""
        if self.chat_template is None:
            raise OneblockError("the tokenizer has no chat template: use generate with a plain prompt")
        roles = {role: self._token(role) or "" for role in ("bos_token", "eos_token", "unk_token", "pad_token")}
        given = {"messages": messages, "tools": tools, "add_generation_prompt": generation_prompt}
        return chat.render(self.chat_template, roles | given | values)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        generation_prompt: bool = True,
        **values: Any,
    ) -> list[int]:
        """The ids of a conversation. Only the template writes control tokens; what people wrote stays text."""
        guarded = [chat.guard(x, self.special) for x in (list(messages), tools, values)]
        text = self.render(guarded[0], guarded[1], generation_prompt, **guarded[2])
        if chat.GUARD not in text:
            return self._encode([text], special=True, add=False)[0]
        names = sorted(self.special, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)  # odd ones are control tokens
        plain = self._encode([chat.unguard(part) for part in parts[::2]], special=False, add=False)
        control = [[self.special[part]] for part in parts[1::2]]
        pieces = [ids for pair in zip(plain, [*control, []], strict=True) for ids in pair]
        return [id for ids in pieces for id in ids]


def _why(texts: Sequence[Any]) -> str:
    """What keeps texts from being encoded."""
    for text in texts:
        if not isinstance(text, str):
            return f"only text can be encoded, not {type(text).__name__}"
        at = next((i for i, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
        if at is not None:
            return f"character {at} of the text is half of a surrogate pair, which is no Unicode: remove it"
    return "the text cannot be encoded"
