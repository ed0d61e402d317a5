"""One tokenizer for every file format of the lineage: text to ids, ids to text, conversations to ids."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Backend

from oneblock.errors import OneblockError
from oneblock.files import write_files
from oneblock.text import files
from oneblock.text.stream import Detokenizer, Pieces

SEAM = "\ufdd0seam\ufdd1"  # between parts that are encoded apart: noncharacters, in no text
BRACKETS = re.compile(r"<.*>|\[.*\]", re.DOTALL)
PIPES = re.compile(r"<\|.*\|>", re.DOTALL)


class Tokenizer:
    """A `tokenizers` object with its folder's habits: what begins and ends a text, the chat template.

    Text never becomes control tokens unless asked: `<|eot_id|>` typed by a user is eight ordinary letters and signs.
    """

    def __init__(
        self,
        backend: Backend,
        config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        tool_template: str | None = None,
        ends: Sequence[int] = (),
    ):
        self.backend, self.config = backend, dict(config or {})
        self.chat_template, self.tool_template = chat_template, tool_template  # the second where tools are given
        self._ends = tuple(ends)  # more ids that end a text, as the model's files have them
        self._lock = threading.Lock()  # around the backend's switch for control tokens
        self._pieces = Pieces(backend)
        added = backend.get_added_tokens_decoder()
        self._hidden = frozenset(id for id, token in added.items() if token.special)
        self._markup = {
            token.content for token in added.values() if not token.special and self._is_markup(token.content)
        }
        backend.add_special_tokens(sorted(self._markup))  # the backend keeps apart from text what it holds for special
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()

    def _is_markup(self, name: str) -> bool:
        """A control token in all but the file's word: `<|fim_prefix|>`, or `<tool_call>` if the template writes it."""
        written = any(name in template for template in (self.chat_template, self.tool_template) if template)
        return bool(PIPES.fullmatch(name) or (written and BRACKETS.fullmatch(name)))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a folder, or one file of it: tokenizer.json, SentencePiece, vocabulary and merges, tiktoken ranks."""
        found = files.read(Path(path))
        return cls(found.backend, found.config, found.chat_template, found.tool_template, found.ends)

    @staticmethod
    def find(folder: str | Path) -> Path | None:
        """The file that `load` would read."""
        return files.find(Path(folder))

    def save(self, folder: str | Path) -> None:
        """tokenizer.json, tokenizer_config.json and the chat template, as Hugging Face folders have them."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | self.config
        config.pop("chat_template", None)
        contents = {"tokenizer.json": self.definition()}
        contents["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        if self.chat_template is not None:
            contents["chat_template.jinja"] = self.chat_template
        if self.tool_template is not None:
            contents[files.TOOL_TEMPLATE] = self.tool_template
        write_files(folder, contents)

    def definition(self) -> str:
        """tokenizer.json, as it is saved."""
        with self._lock:
            text = self.backend.to_str(pretty=True)
        if not self._markup:
            return text
        found = json.loads(text)
        for token in found["added_tokens"]:
            token["special"] = token["special"] and token["content"] not in self._markup  # as it was
        return json.dumps(found, indent=2, ensure_ascii=False)

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size:,} ids, {len(self.special)} of them control tokens)"

    # ------------------------------------------------------------------ what there is

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id: the rows an embedding needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def special(self) -> dict[str, int]:
        """The control tokens and their ids. `decode` leaves out those that the tokenizer's file calls special."""
        added = self.backend.get_added_tokens_decoder().items()
        return {token.content: id for id, token in added if token.special or token.content in self._markup}

    @cached_property
    def bos_id(self) -> int | None:
        """What begins a text."""
        return self._id("bos_token")

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """What ends a text: the tokenizer's own first, then those of `generation_config.json` and `config.json`."""
        id = self._id("eos_token")
        return tuple(dict.fromkeys((*(() if id is None else (id,)), *self._ends)))

    def _id(self, role: str) -> int | None:
        token = files.token(self.config, role)
        return None if token is None else self.backend.token_to_id(token)

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
                encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=add)
            except (TypeError, UnicodeEncodeError):
                raise OneblockError(_why(texts)) from None
            finally:
                self.backend.encode_special_tokens = True
        if special:
            return [e.ids for e in encoded]
        return [self._broken(t, add) if self._leaks(e) else e.ids for t, e in zip(texts, encoded, strict=True)]

    def _leaks(self, encoded: Encoding) -> bool:
        """Whether the vocabulary made a control token of plain text, as unigram models do where it spells one."""
        control = self._control_ids
        if control.isdisjoint(encoded.ids):
            return False
        added = encoded.special_tokens_mask  # 1: by the post-processor
        return any(id in control and not mark for id, mark in zip(encoded.ids, added, strict=True))

    def _broken(self, text: str, add: bool) -> list[int]:
        """The ids of a text in which each control token is cut in two."""
        cut = self._control.sub(lambda found: found[0][:1] + SEAM + found[0][1:], text.replace(SEAM, ""))
        seam = self._seamed.token_to_id(SEAM)
        return [id for id in self._seamed.encode(cut, add_special_tokens=add).ids if id != seam]

    # ------------------------------------------------------------------ ids to text

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids. Bytes that are no UTF-8 become U+FFFD; ids outside the vocabulary are left out."""
        if self._pieces.spelling is not None:
            return self._pieces.text(ids, self._hidden if skip_special else frozenset())
        stream = self.stream(skip_special)
        return "".join(stream.push(id) for id in ids) + stream.flush()

    def stream(self, skip_special: bool = True) -> Detokenizer:
        """Ids to text one by one."""
        return Detokenizer(self._pieces, self._hidden if skip_special else frozenset())

    # ------------------------------------------------------------------ conversations

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        generation_prompt: bool = True,
        **values: Any,
    ) -> str:
        """A conversation `[{"role": "user", "content": ".."}, ..]` as the text of the chat template."""
        template = self.tool_template if tools and self.tool_template else self.chat_template
        if template is None:
            raise OneblockError("the tokenizer has no chat template: use generate with a plain prompt")
        from oneblock.text import chat, sandbox  # jinja2 costs as much time as all the rest

        roles = {role: found for role in files.ROLES if (found := files.token(self.config, role)) is not None}
        given = {"messages": chat.without_none(messages), "tools": chat.plain(tools)}
        given |= {"add_generation_prompt": generation_prompt}
        return sandbox.render(template, roles | given | chat.plain(values))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        generation_prompt: bool = True,
        **values: Any,
    ) -> list[int]:
        """The ids of a conversation. Only the template writes control tokens; what people wrote stays text.

        Of the control tokens that the tokenizer's file does not call special, such as `<think>`, those in the
        model's own messages are left to the template.
        """
        from oneblock.text import chat

        said = chat.without_none(messages)
        mark = chat.unused(said, chat.plain(tools), chat.plain(values), self.chat_template, self.tool_template)
        everyone = chat.Guard(self.special, mark)
        model = chat.Guard(
            [name for name, id in self.special.items() if id in self._hidden or PIPES.fullmatch(name)], mark
        )
        said = [(model if message.get("role") == "assistant" else everyone)(message) for message in said]
        text = self.render(said, everyone(chat.plain(tools)), generation_prompt, **everyone(chat.plain(values)))
        text = text.replace(f"\\u{ord(mark):04x}", mark)  # JSON in ASCII alone writes it so
        if mark not in text:
            return self._encode([text], special=True, add=False)[0]
        return self._encode_marked(text, mark)

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        """The ids of a text whose control tokens count, but for those with a mark inside."""
        text = text.replace(SEAM, "")
        names = [found[0] for found in self._control.finditer(text)]
        control = (self.special.get(name, self.special.get(name.strip())) for name in names)
        seamed = self._control.sub(SEAM, text).replace(mark, "")
        seam = self._seamed.token_to_id(SEAM)
        ids = self._seamed.encode(seamed, add_special_tokens=False).ids
        return [next(control) if id == seam else id for id in ids]  # pyright: ignore[reportReturnType]

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        """Without the one for what the vocabulary lacks, which plain text may well become."""
        unknown = files.token(self.config, "unk_token") or getattr(self.backend.model, "unk_token", None) or "<unk>"
        return frozenset(id for name, id in self.special.items() if name != unknown)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Control tokens, longest first, with the spaces that they take in."""
        added = [t for t in self.backend.get_added_tokens_decoder().values() if t.content in self.special]
        added.sort(key=lambda token: len(token.content), reverse=True)
        spaces = (r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in added)
        return re.compile("|".join(spaces) or "(?!)")

    @cached_property
    def _seamed(self) -> Backend:
        """A copy with one more token, which stands for every control token while the text between them is encoded.

        Parts encoded one by one would each begin a text, and so with a space in SentencePiece's vocabularies.
        """
        with self._lock:
            backend = Backend.from_str(self.backend.to_str())
        backend.add_tokens([AddedToken(SEAM, normalized=False, special=False)])
        backend.encode_special_tokens = True
        return backend


def _why(texts: Sequence[Any]) -> str:
    """What keeps texts from being encoded."""
    for text in texts:
        if not isinstance(text, str):
            return f"only text can be encoded, not {type(text).__name__}"
        at = next((i for i, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
        if at is not None:
            return f"character {at} of the text is half of a surrogate pair, which is no Unicode: remove it"
    return "the text cannot be encoded"
