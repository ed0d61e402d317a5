"""One tokenizer class for every file format: text to ids, ids to text, conversations to ids."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tokenizers import AddedToken, Encoding, models
from tokenizers import Tokenizer as Backend

from oneblock.errors import OneblockError
from oneblock.files import write_files
from oneblock.text import formats
from oneblock.text.stream import Detokenizer, TokenBytes

if TYPE_CHECKING:
    from oneblock.text.chat import ContentMask, Conversation

Messages: TypeAlias = "Sequence[Mapping[str, Any]]"  # [{"role": "user", "content": ".."}, ..]
Tools: TypeAlias = "Sequence[Any] | None"

MARK = "\ufdd0"  # a noncharacter, removed from text where the next two are used
CONTROL_MARK = f"{MARK}control"  # stands for a control token while the text around it is encoded
CUT_MARK = f"{MARK}cut"  # cuts the spelling of a control token in plain text
BRACKETS = re.compile(r"<.*>|\[.*\]", re.DOTALL)
PIPES = re.compile("<[|\uff5c].*[|\uff5c]>", re.DOTALL)  # DeepSeek writes fullwidth bars


class Tokenizer:
    """A `tokenizers` backend with its folder's settings: beginning and end of text, the chat template.

    Text becomes control tokens only on request: `<|eot_id|>` typed by a user is encoded as ordinary characters.
    """

    def __init__(
        self,
        backend: Backend,
        config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        tool_template: str | None = None,
        eos_ids: Sequence[int] = (),
    ):
        """`tool_template`: the chat template for calls with tools. `eos_ids`: end-of-text ids besides the config's."""
        self.backend, self.config = backend, dict(config or {})
        self.chat_template, self.tool_template = chat_template, tool_template
        self._more_eos_ids = tuple(eos_ids)
        self._lock = threading.Lock()  # around the backend's switch for control tokens
        self._token_bytes = TokenBytes(backend)
        added = backend.get_added_tokens_decoder()
        self._hidden = frozenset(id for id, token in added.items() if token.special)
        self._markup = {
            token.content for token in added.values() if not token.special and self._is_markup(token.content)
        }
        backend.add_special_tokens(sorted(self._markup))  # plain text must not become these either
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()

    def _is_markup(self, name: str) -> bool:
        """Whether a token acts as a control token, although its file does not call it special.

        Such are `<|fim_prefix|>`, and `<tool_call>` where the template writes it.
        """
        written = any(name in template for template in (self.chat_template, self.tool_template) if template)
        return bool(PIPES.fullmatch(name) or (written and BRACKETS.fullmatch(name)))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a folder, or one file of it: tokenizer.json, SentencePiece, vocabulary and merges, tiktoken ranks."""
        return cls(*formats.read_tokenizer(Path(path)))

    @staticmethod
    def find(folder: str | Path) -> Path | None:
        """The file of a folder that `load` would read."""
        return formats.find_tokenizer(Path(folder))

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat template, as Hugging Face folders have them."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | self.config
        config.pop("chat_template", None)
        texts = {
            "tokenizer.json": self.definition(),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
            "chat_template.jinja": self.chat_template,
            formats.TOOL_TEMPLATE: self.tool_template,
        }
        write_files(folder, {name: text for name, text in texts.items() if text is not None})

    def definition(self) -> str:
        """The contents of tokenizer.json."""
        with self._lock:
            text = self.backend.to_str(pretty=True)
        if not self._markup:
            return text
        definition = json.loads(text)
        for token in definition["added_tokens"]:
            token["special"] = token["special"] and token["content"] not in self._markup  # as in its file
        return json.dumps(definition, indent=2, ensure_ascii=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickle and deepcopy: the state is the definition and the settings."""
        settings = (self.config, self.chat_template, self.tool_template, self._more_eos_ids)
        return _from_definition, (self.definition(), *settings)

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size:,} ids, {len(self.special)} control tokens)"

    # ------------------------------------------------------------------ vocabulary

    @cached_property
    def vocab_size(self) -> int:
        """The number of embedding rows that the ids need: the highest id plus one."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def special(self) -> dict[str, int]:
        """The control tokens and their ids. `decode` hides those that the tokenizer's file calls special."""
        added = self.backend.get_added_tokens_decoder().items()
        return {token.content: id for id, token in added if token.special or token.content in self._markup}

    @cached_property
    def bos_id(self) -> int | None:
        """The beginning-of-text id."""
        return self._role_id("bos_token")

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """The end-of-text ids: the tokenizer's own first, then those of generation_config.json and config.json."""
        id = self._role_id("eos_token")
        return tuple(dict.fromkeys((*(() if id is None else (id,)), *self._more_eos_ids)))

    def _role_id(self, role: str) -> int | None:
        token = formats.read_token(self.config, role)
        return None if token is None else self.backend.token_to_id(token)

    # ------------------------------------------------------------------ text to ids

    def encode(self, text: str, bos: bool | None = None, special: bool = False) -> list[int]:
        """Return the token ids of a text.

        `bos`: True or False: with or without the beginning-of-text token; None: as the tokenizer's file says.
        `special`: control tokens written in the text become their ids; otherwise they are encoded as plain text.
        """
        return self.encode_batch([text], bos, special)[0]

    def encode_batch(self, texts: Sequence[str], bos: bool | None = None, special: bool = False) -> list[list[int]]:
        """Encode several texts at once, on every core."""
        if bos and self.bos_id is None:
            raise OneblockError("the tokenizer has no beginning-of-text token: use bos=False")
        batch = self._encode(texts, special, add=bos is None)
        return [[self.bos_id, *ids] for ids in batch] if bos else batch  # pyright: ignore[reportReturnType]

    def _encode(self, texts: Sequence[str], special: bool, add: bool) -> list[list[int]]:
        """`add`: with the tokens that the file's post-processor puts at both ends."""
        if self._alphabet is not None:
            for text in texts:
                self._check_characters(text)
        with self._lock:
            self.backend.encode_special_tokens = not special
            try:
                encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add)
            except (TypeError, UnicodeEncodeError):
                raise OneblockError(_explain_failure(texts)) from None
            finally:
                self.backend.encode_special_tokens = True
        if special:
            return [encoding.ids for encoding in encodings]
        return [
            self._encode_plain(text.replace(MARK, ""), add) if self._control_spans(encoding) else encoding.ids
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    @cached_property
    def _alphabet(self) -> frozenset[str] | None:
        """The characters of a character-level vocabulary, which would drop any other; None for other models."""
        model: Any = self.backend.model
        if not isinstance(model, models.BPE) or model.unk_token is not None or model.byte_fallback:
            return None
        if self.backend.normalizer is not None or self.backend.pre_tokenizer is not None:
            return None
        return frozenset("".join(self.backend.get_vocab(with_added_tokens=True)))

    def _check_characters(self, text: str) -> None:
        assert self._alphabet is not None
        if isinstance(text, str) and (unknown := set(text) - self._alphabet):
            at, character = min((text.index(character), character) for character in unknown)
            raise OneblockError(
                f"character {character!r} (U+{ord(character):04X}, at position {at}) is not in the tokenizer's "
                f"vocabulary of {len(self._alphabet):,} characters: remove it, or use a byte-level tokenizer"
            )

    def _control_spans(self, encoding: Encoding) -> list[tuple[int, int]]:
        """Where the vocabulary made a control token of plain text, as (start, end) in characters.

        Unigram models do where a text spells one, before or after normalization (NFKC, lowercase).
        """
        control = self._control_ids
        if control.isdisjoint(encoding.ids):
            return []
        parts = zip(encoding.ids, encoding.offsets, encoding.special_tokens_mask, strict=True)
        return [span for id, span, added in parts if id in control and not added]  # added: by the post-processor

    def _encode_plain(self, text: str, add: bool, control: Sequence[int] = ()) -> list[int]:
        """The ids of a text in which each CONTROL_MARK becomes the next of `control`, and nothing else a control id."""
        backend = self._marked_backend
        mark, cut = backend.token_to_id(CONTROL_MARK), backend.token_to_id(CUT_MARK)
        while spans := self._control_spans(encoding := backend.encode(text, add_special_tokens=add)):
            for start, end in reversed(spans):
                if end - start < 2:
                    raise OneblockError(f"{text[start:end]!r} normalizes to a control token: remove it from the text")
                text = text[: start + 1] + CUT_MARK + text[start + 1 :]
        ids = iter(control)
        return [next(ids) if id == mark else id for id in encoding.ids if id != cut]

    # ------------------------------------------------------------------ ids to text

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of token ids. Invalid UTF-8 becomes U+FFFD; ids outside the vocabulary are skipped."""
        if self._token_bytes.spelling is not None:
            return self._token_bytes.decode(ids, self._hidden if skip_special else frozenset())
        stream = self.stream(skip_special)
        return "".join(stream.push(id) for id in ids) + stream.flush()

    def stream(self, skip_special: bool = True) -> Detokenizer:
        """A detokenizer that takes ids one at a time."""
        return Detokenizer(self._token_bytes, self._hidden if skip_special else frozenset())

    # ------------------------------------------------------------------ conversations

    def render(self, messages: Messages, tools: Tools = None, generation_prompt: bool = True, **options: Any) -> str:
        """Return the text of a conversation `[{"role": "user", "content": ".."}, ..]` by the chat template."""
        from oneblock.text import chat_template

        conversation = self._conversation(messages, tools, generation_prompt, options)
        return chat_template.render(conversation.template, conversation.values())

    def chat(
        self, messages: Messages, tools: Tools = None, generation_prompt: bool = True, **options: Any
    ) -> list[int]:
        """Return the token ids of a conversation. Only the template writes control tokens; message text stays text.

        Assistant messages may write the control tokens that the tokenizer's file does not call special, such as
        `<think>`.
        """
        from oneblock.text import chat

        conversation = self._conversation(messages, tools, generation_prompt, options)
        strings = [conversation.template, *chat.iterate_strings(conversation.values())]
        reserved = "".join(filter(chat.RESERVED.search, strings))
        mask = self._build_mask(reserved) if reserved else self._content_mask
        return self._encode_rendered(chat.render_masked(conversation, mask, self._control), mask)

    def _conversation(
        self, messages: Messages, tools: Tools, generation_prompt: bool, options: dict[str, Any]
    ) -> Conversation:
        from oneblock.text import chat

        template = self.tool_template if tools and self.tool_template else self.chat_template
        if template is None:
            raise OneblockError("the tokenizer has no chat template: use generate with a plain prompt")
        roles = {role: token for role in formats.ROLES if (token := formats.read_token(self.config, role)) is not None}
        try:
            given = chat.json_value({"messages": list(messages), "tools": tools, "options": options})
        except RecursionError:
            raise OneblockError("the messages or tools are nested too deeply for a chat template") from None
        options = {"add_generation_prompt": generation_prompt} | given["options"]
        return chat.Conversation(template, chat.drop_none(given["messages"]), given["tools"], options, roles)

    def _encode_rendered(self, rendered: str, mask: ContentMask) -> list[int]:
        """The ids of `chat.render_masked`'s text: control tokens that are not masked become their ids."""
        matches = list(self._control.finditer(rendered))
        control = [self.special.get(match[0], self.special.get(match[0].strip(), -1)) for match in matches]
        text = mask.restore(rendered)
        if [match.span() for match in self._control.finditer(text)] == [match.span() for match in matches]:
            [ids] = self._encode([text], special=True, add=False)
            if [id for id in ids if id in self._control_ids] == [id for id in control if id in self._control_ids]:
                return ids  # no normalizer made another one
        parts = (mask.restore(part).replace(MARK, "") for part in self._control.split(rendered))
        return self._encode_plain(CONTROL_MARK.join(parts), add=False, control=control)

    @cached_property
    def _content_mask(self) -> ContentMask:
        return self._build_mask("")

    def _build_mask(self, reserved: str) -> ContentMask:
        from oneblock.text import chat

        markup = [name for name, id in self.special.items() if id not in self._hidden and not PIPES.fullmatch(name)]
        return chat.ContentMask(self.special, markup, reserved)

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        """Ids of control tokens except the unknown token, which plain text may become."""
        unknown = (
            formats.read_token(self.config, "unk_token") or getattr(self.backend.model, "unk_token", None) or "<unk>"
        )
        return frozenset(id for name, id in self.special.items() if name != unknown)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Matches control tokens, longest first, with the spaces that they absorb."""
        added = [t for t in self.backend.get_added_tokens_decoder().values() if t.content in self.special]
        added.sort(key=lambda token: len(token.content), reverse=True)
        spaces = (r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in added)
        return re.compile("|".join(spaces) or "(?!)")

    @cached_property
    def _marked_backend(self) -> Backend:
        """A copy with two more tokens: one stands for a control token, one cuts a spelled control token in two.

        Encoding the parts one by one would add SentencePiece's space prefix to each.
        """
        with self._lock:
            backend = Backend.from_str(self.backend.to_str())
        backend.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in (CONTROL_MARK, CUT_MARK)])
        backend.encode_special_tokens = True
        return backend


def _explain_failure(texts: Sequence[Any]) -> str:
    """The reason why texts cannot be encoded."""
    for text in texts:
        if not isinstance(text, str):
            return f"only strings can be encoded, not {type(text).__name__}"
        at = next((i for i, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
        if at is not None:
            return f"character {at} of the text is half of a surrogate pair, which is not valid Unicode: remove it"
    return "the text cannot be encoded"


def _from_definition(definition: str, *settings: Any) -> Tokenizer:
    return Tokenizer(Backend.from_str(definition), *settings)
