"""Structured output: every sampled reply matches, batched == unbatched, errors are one line."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import oneblock
from oneblock import OneblockError, cli
from oneblock.infer.llm import LLM
from oneblock.infer.options import SamplingParams
from oneblock.infer.sample import sample_tokens
from oneblock.infer.structured_output import (
    CompiledGrammar,
    Ending,
    GrammarMatcher,
    GrammarVocabulary,
    StructuredOutput,
)
from oneblock.model import Decoder, init_weights
from oneblock.text import Tokenizer
from oneblock.text.stream import TokenBytes
from oneblock.text.train import byte_level, train_bpe

pytest.importorskip("llguidance")

END = 256
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "age": {"type": "integer", "minimum": 7, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", 'b"', 3, None]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
REGEXES = [
    r"[ab]{3,5}",
    r"\d{4}-\d{2}-\d{2}",
    r"(yes|no|maybe)( indeed)?\.",
    r"[^x\n]{1,4}x",
    r"日本|é{2}|\u00ff",
    r"a/b\\c\"\n\t?",
]
CHOICES = ["yes", "yes, of course", "no", 'a "quoted" one', "日本", "a\\b\n\x08\x0c\x00", "(.*)|^$"]
SUM = """
start: sum
sum: NUMBER | "(" sum "+" sum ")"
NUMBER: /[0-9]{1,2}/
"""


@pytest.fixture(scope="module")
def llm() -> LLM:
    """One id for each byte, and one that ends a text; nearly every next byte as likely as any other."""
    model = Decoder(oneblock.get_spec("llama", vocab=257, context=300, dim=32, n_layers=2, n_heads=2, hidden_dim=48))
    init_weights(model, 1)
    return LLM(model, byte_level(), generation_config={"eos_token_id": END})


@pytest.fixture(scope="module")
def stories(data: Path) -> LLM:
    return oneblock.load(data / "weights/stories260k")


def sampled(llm: LLM, n: int = 24, **options: Any) -> list[str]:
    """The texts of n replies, of which none was cut."""
    found = llm.generate(["x" * (1 + i % 5) for i in range(n)], seed=11, temperature=1.0, max_tokens=200, **options)
    assert {reply.finish_reason for reply in found} == {"stop"}
    return [reply.text or "" for reply in found]


def is_person(text: str) -> bool:
    x = json.loads(text)
    tags = x.pop("tags", ["a"])
    return (
        x.keys() == {"name", "age"}
        and isinstance(x["name"], str)
        and 1 <= len(x["name"]) <= 6
        and type(x["age"]) is int
        and 7 <= x["age"] <= 120
        and 1 <= len(tags) <= 3
        and all(tag in ("a", 'b"', 3, None) for tag in tags)
    )


# ------------------------------------------------------------------ every reply is one


def test_replies_match_a_schema(llm: LLM) -> None:
    texts = sampled(llm, 60, schema=PERSON)
    assert all(map(is_person, texts))
    assert len({len(text) for text in texts}) > 5
    assert any("tags" in text for text in texts) and not all("tags" in text for text in texts)
    assert all(map(is_person, sampled(llm, 4, schema=json.dumps(PERSON))))
    assert set(sampled(llm, schema={"type": "boolean"})) == {"true", "false"}


def test_any_json_is_json(llm: LLM) -> None:
    found = llm.generate(["x"] * 40, schema=True, seed=0, max_tokens=200)
    whole = [reply.text for reply in found if reply.finish_reason == "stop"]
    assert len(whole) > 3
    for text in whole:
        json.loads(text or "")


@pytest.mark.parametrize("regex", REGEXES)
def test_replies_match_a_regex(llm: LLM, regex: str) -> None:
    texts = sampled(llm, 30, regex=regex)
    assert all(re.fullmatch(regex, text) for text in texts)
    assert len(set(texts)) > 1


def test_replies_are_choices(llm: LLM) -> None:
    assert set(sampled(llm, 60, choices=CHOICES)) <= set(CHOICES)
    assert {text for text in sampled(llm, 40, choices=["a", "ab", "b"])} == {"a", "ab", "b"}
    many = [f"{i:05d}" for i in range(20_000)]
    assert set(sampled(llm, 4, choices=many)) <= set(many)


@pytest.fixture(scope="module")
def without_eos(llm: LLM) -> LLM:
    """The same model, where no token ends a text."""
    return LLM(llm.model, byte_level())


def test_choices_without_end_of_text(without_eos: LLM) -> None:
    """A choice that is a prefix of another ends where the model does not continue it."""
    choices = ["a", "ab", "abc", "b"]
    texts = sampled(without_eos, 80, choices=choices, logit_bias={ord(c): 6.0 for c in "abc"})
    assert set(texts) == set(choices)
    texts = sampled(without_eos, 40, choices=choices, logit_bias={ord("b"): -1e4})
    assert set(texts) == {"a"}
    for bias, expected in (({ord("a"): 1e4}, "a"), ({ord("a"): 1e3, ord("b"): 1e4, ord("c"): 1e4}, "b")):
        found = without_eos.generate("x", choices=choices, temperature=0, logit_bias=bias)
        assert (found.text, found.finish_reason) == (expected, "stop")
    logits = {ord("a"): 100.0, ord("b"): 50.0, ord("z"): 60.0}  # after "a", "z" is likelier than "b"
    assert without_eos.generate("x", choices=["a", "ab"], temperature=0, logit_bias=logits).text == "a"
    logits = {ord("a"): 50.0, ord("b"): 100.0}
    assert without_eos.generate("x", choices=["a", "ab"], temperature=0, logit_bias=logits).text == "ab"


def test_choices_without_end_of_text_in_batches_and_with_draft_tokens(without_eos: LLM) -> None:
    choices = ["a", "ab", "abc", "abcd", "xy"]
    options: dict[str, Any] = {"choices": choices, "logit_bias": {ord(c): 4.0 for c in "abcd"}}
    prompts, seeds = ["x", "a longer prompt", "yy"], [3, 1, 4]
    batch = without_eos.generate(prompts, seed=seeds, **options)
    for prompt, seed, reply in zip(prompts, seeds, batch, strict=True):
        single = without_eos.generate(prompt, seed=seed, **options)
        assert (single.ids, single.text, single.finish_reason) == (reply.ids, reply.text, "stop")
        assert "".join(without_eos.stream(prompt, seed=seed, **options)) == reply.text
    speculative = LLM(without_eos.model, without_eos.tokenizer)
    speculative.set_speculative_decoding(3)
    for prompt in ("abab", "x", "abcdabcd"):
        expected = without_eos.generate(prompt, temperature=0, **options)
        assert speculative.generate(prompt, temperature=0, **options).text == expected.text
        assert speculative.generate(prompt, seed=1, **options).text in choices


def test_replies_match_a_grammar(llm: LLM) -> None:
    for text in sampled(llm, 20, grammar=SUM):
        assert re.fullmatch(r"[0-9+()]+", text)
        assert eval(re.sub(r"(?<!\d)0+(?=\d)", "", text)) >= 0


def test_without_the_mask_replies_do_not_match(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GrammarMatcher, "allowed_tokens", lambda self: torch.ones(257, dtype=torch.bool))
    monkeypatch.setattr(GrammarMatcher, "accept_token", lambda self, id: Ending.NONE)
    found = llm.generate(["x"] * 8, choices=CHOICES, seed=0, max_tokens=20)
    assert not any(reply.text in CHOICES for reply in found)


def test_finish_reason_of_truncated_replies(llm: LLM) -> None:
    found = llm.generate("x", regex="a{10}", max_tokens=4)
    assert (found.text, found.finish_reason) == ("aaaa", "length")
    found = llm.generate("x", regex="a{4}", max_tokens=4)
    assert (found.text, found.finish_reason) == ("aaaa", "stop")


# ------------------------------------------------------------------ where a text may end


def test_end_of_text_is_allowed_where_the_grammar_may_end(llm: LLM) -> None:
    eager, never = {END: 1e4}, {END: -1e4}
    assert llm.generate("x", regex="[ab]{3,5}", logit_bias=eager).ids[3:] == [END]
    held: list[dict[str, Any]] = [{"logit_bias": never}, {"logit_bias": eager, "ignore_eos": True}]
    for options in held:
        found = llm.generate("x", regex="[ab]{3,5}", **options)
        assert (len(found.ids), found.finish_reason) == (5, "stop")  # nothing can follow: no token more is made
    assert llm.generate("x", regex="a?", logit_bias=eager).text == ""


def test_stop_ids_and_stop_texts(llm: LLM) -> None:
    bias = {ord("a"): 1e4}
    found = llm.generate("x", regex="b[ab]{3}", stop_ids=[ord("a")], logit_bias=bias)
    assert found.text == "bbbb"[: len(found.ids)]  # a stop id has no text, so it is no part of the match
    assert llm.generate("x", regex="[ab]{9}", stop="aa", logit_bias=bias).text == ""


def test_mask_is_applied_after_logit_bias_and_before_filters() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    allowed = torch.tensor([[False, False, True, True]])
    generator = torch.tensor([0.99], dtype=torch.float64)
    for sampling in (
        SamplingParams(top_k=1),
        SamplingParams(top_p=0.5),
        SamplingParams(min_p=0.9),
        SamplingParams(temperature=0),
    ):
        assert sample_tokens(logits, sampling, None, generator, allowed).tolist() == [2]
    assert sample_tokens(logits, SamplingParams(temperature=0, logit_bias={3: 2.0}), None, None, allowed).tolist() == [
        3
    ]
    with pytest.raises(OneblockError, match="no token may follow"):
        sample_tokens(logits, SamplingParams(logit_bias={2: -torch.inf, 3: -torch.inf}), None, generator, allowed)


# ------------------------------------------------------------------ batches, streams, log-probabilities


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}])
@pytest.mark.parametrize("asked", [{"schema": PERSON}, {"choices": CHOICES}, {"regex": r"(\w{1,3} ){1,6}end"}])
def test_batched_equals_unbatched(llm: LLM, options: dict[str, Any], asked: dict[str, Any]) -> None:
    prompts, seeds = ["x", "a longer prompt", "mid size", "yy"], [3, 1, 4, 1]
    together = llm.generate(prompts, seed=seeds, **options, **asked)
    assert len({len(reply.ids) for reply in together}) > 1 or "schema" not in asked  # rows leave
    for prompt, seed, reply in zip(prompts, seeds, together, strict=True):
        alone = llm.generate(prompt, seed=seed, **options, **asked)
        assert (reply.ids, reply.text, reply.finish_reason) == (alone.ids, alone.text, alone.finish_reason)
        assert reply.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_logprobs_are_the_models_own(llm: LLM) -> None:
    found = llm.generate("x", regex="[ab]{6}", top_logprobs=2, seed=0)
    with torch.no_grad():
        own = llm.model(torch.tensor([found.prompt_ids + found.ids]))[0].log_softmax(-1)
    n = len(found.prompt_ids)
    assert found.logprobs == pytest.approx([own[n - 1 + i, id].item() for i, id in enumerate(found.ids)], abs=1e-4)
    assert len(found.top_logprobs) == 6


def test_streams(llm: LLM) -> None:
    options: dict[str, Any] = {"schema": PERSON, "seed": 5}
    assert "".join(llm.stream("x", **options)) == llm.generate("x", **options).text
    assert list(llm.stream_ids("x", **options)) == llm.generate("x", **options).ids


# ------------------------------------------------------------------ real tokenizers


def test_a_trained_model(stories: LLM) -> None:
    choices = ["Lily", "Tom", "the big dog", " with a space before"]
    for prompt in ("Once upon a time", "", '"'):  # after nothing the first space is not shown
        found = stories.generate([prompt] * 12, choices=choices, seed=0, temperature=1.5)
        assert {reply.text for reply in found} <= set(choices)
        assert len({reply.text for reply in found}) > 1 or prompt.startswith("Once")
    assert stories.generate("", regex=" x").text == " x"
    found = stories.generate(["A", "The dog was"] * 6, regex=r"( [a-z]+){4}\.", seed=3, max_tokens=100)
    assert all(re.fullmatch(r"( [a-z]+){4}\.", reply.text or "") for reply in found if reply.finish_reason == "stop")
    assert any(reply.finish_reason == "stop" for reply in found)
    greedy = stories.generate("Tom said:", schema={"enum": ["yes", "no"]}, temperature=0)
    assert greedy.text in ('"yes"', '"no"')


@pytest.mark.parametrize(
    "name", ["gpt2", "llama2", "llama3", "qwen2_5", "tiktoken/cl100k_base.tiktoken", "../weights/stories260k"]
)
@pytest.mark.parametrize("text", ["Hello, world! 123\n\n  x = {'é': \"日本\"} 🎉\t", '{"a": [1, 2.5e3]}'])
def test_bytes_of_every_kind_of_tokenizer(data: Path, name: str, text: str) -> None:
    if not (data / "tokenizers" / name).exists():
        pytest.skip(f"no {name} in the data")
    tokenizer = Tokenizer.load(data / "tokenizers" / name)
    ids, pieces = tokenizer.encode(text, bos=False), TokenBytes(tokenizer.backend)
    shown = b"".join(pieces[id] for id in ids).decode()
    assert shown.removeprefix(" ") == text
    matcher = CompiledGrammar(
        StructuredOutput(choices=[shown, shown + "."]), tokenizer, tokenizer.vocab_size
    ).start_matcher()
    for id in ids:
        assert matcher.allowed_tokens()[id]
        assert not matcher.allowed_tokens()[list(tokenizer.special.values())].any()
        assert matcher.accept_token(id) == Ending.NONE
    assert matcher.allowed_tokens().all()  # a choice is complete, so any token may end the reply
    assert GrammarVocabulary.get(tokenizer, tokenizer.vocab_size) is GrammarVocabulary.get(
        tokenizer, tokenizer.vocab_size
    )


def test_control_tokens_are_no_text() -> None:
    tokenizer = train_bpe(["some text"], 257)
    [end] = tokenizer.eos_ids
    matcher = CompiledGrammar(StructuredOutput(choices=["<|endoftext|>"]), tokenizer, 257).start_matcher()
    assert matcher.allowed_tokens().nonzero().flatten().tolist() == tokenizer.encode("<")
    matcher = CompiledGrammar(StructuredOutput(grammar="start: <|endoftext|> /x/"), tokenizer, 257).start_matcher()
    assert matcher.allowed_tokens().nonzero().flatten().tolist() == [end]


# ------------------------------------------------------------------ refusals


BAD: list[tuple[dict[str, Any], str]] = [
    ({"schema": "{bad"}, "the schema is not valid JSON"),
    ({"schema": "3"}, "a JSON schema is an object or true"),
    ({"schema": False}, "no string matches it"),
    ({"schema": {"type": "strin"}}, "Invalid type: strin"),
    ({"schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "Unsatisfiable schema"),
    ({"schema": {"allOf": [{"type": "string"}, {"type": "number"}]}}, "Unsatisfiable schema"),
    ({"schema": {"$ref": "#"}}, "no string matches it"),
    ({"schema": {"not": {"type": "string"}}}, "Unimplemented keys"),
    ({"schema": {"$ref": "https://example.com/x"}}, "does not fetch"),
    ({"schema": {"enum": [{1}]}}, "not valid JSON"),
    ({"regex": "(a"}, r"the regex '\(a': unclosed group"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"regex": r"[^\s\S]"}, "no string matches it"),
    ({"regex": 3}, "regex must be a string"),
    ({"regex": "a" * 70_000}, "70,009 bytes"),
    ({"grammar": "start: foo"}, 'unknown name: "foo"'),
    ({"grammar": ""}, "no start rule"),
    ({"grammar": 'start: start "a"'}, "no string matches it"),
    ({"choices": []}, "choices must be a list of strings"),
    ({"choices": "yes"}, "choices must be a list of strings"),
    ({"choices": ["a", ""]}, "none of them empty"),
    ({"choices": ["\ud800"]}, "surrogate"),
    ({"choices": ["a"], "regex": "a"}, "give one of schema, regex, grammar and choices, not regex and choices"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[b[1][:24] for b in BAD])
def test_invalid_options_are_refused_in_one_line(llm: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OneblockError, match=f"^[^\n]{{0,80}}.*{message}[^\n]*$"):
        llm.generate("x", **options)


BOMBS = [
    {"regex": "(a{1,1000}){1,1000}"},
    {"regex": "(([a-z]{0,9}){0,99}){0,999}"},
    {"regex": "(((((a?){50}){50}){50}){50}){50}"},
    {"regex": r"(\w{1,1000} ){1,1000}z"},
    {"regex": "(.*a.{20}){20}"},
    {"regex": "(" * 30_000 + "a" + ")" * 30_000},
    {"grammar": 'start: x{1,1000000}\nx: y{1,1000000}\ny: "a" | "b" y | y y'},
    {"grammar": "start: A0\n" + "\n".join(f'A{i}: A{i + 1} "x"' for i in range(3000)) + '\nA3000: "a"'},
    {"schema": {"type": "array", "minItems": 10**9}},
    {"schema": {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"}},
    {
        "schema": {
            "$ref": "#/$defs/a0",
            "$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(5000)} | {"a5000": {}},
        }
    },
]


@pytest.mark.parametrize("options", BOMBS, ids=[str(b)[:40] for b in BOMBS])
def test_exponential_grammars_end_within_seconds(llm: LLM, options: dict[str, Any]) -> None:
    """They are refused or harmless; the process survives."""
    start = time.perf_counter()
    try:
        llm.generate("x", max_tokens=250, seed=0, **options)
    except OneblockError as error:
        assert re.search("too complex|too large|nested|many", str(error)) and "\n" not in str(error)
    assert time.perf_counter() - start < 10


def test_a_regex_too_large_for_a_real_vocabulary_is_refused(stories: LLM) -> None:
    with pytest.raises(OneblockError, match="too complex"):
        stories.generate("x", regex="(([a-z]{0,9}){0,99}){0,999}", max_tokens=200, seed=0)


def test_missing_tokenizer_and_package_are_named(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OneblockError, match="choices needs a tokenizer"):
        LLM(llm.model).generate([1], choices=["a"])
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(
        OneblockError,
        match=r"structured output needs the package llguidance.* -m pip install llguidance .*\.\[structured\]",
    ):
        llm.generate("x", choices=["a"])


# ------------------------------------------------------------------ the command


def test_the_command(llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm.save(tmp_path / "model")
    (tmp_path / "person.json").write_text(json.dumps(PERSON))
    (tmp_path / "sum.lark").write_text(SUM)

    def run(*flags: str) -> str:
        code = cli.main(["generate", str(tmp_path / "model"), "--prompt", "x", "--seed", "1", "--no-stream", *flags])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return out.removesuffix("\n") if code == 0 else err

    assert is_person(run("--schema", str(tmp_path / "person.json")))
    assert is_person(run("--schema", json.dumps(PERSON)))
    assert re.fullmatch("[ab]{3}", run("--regex", "[ab]{3}"))
    assert re.fullmatch("[0-9+()]+", run("--grammar", str(tmp_path / "sum.lark")))
    assert run("--choices", "yes", "no") in ("yes", "no")
    assert "no/such.json: No such file" in run("--schema", "no/such.json")
    assert "give one of" in run("--regex", "a", "--choices", "b")


# ------------------------------------------------------------------ guesses


@pytest.mark.parametrize("by", ["text", "itself", "another"])
def test_guesses_keep_to_a_form_too(llm: LLM, by: str) -> None:
    """The same greedy replies as without guesses, whatever is guessed; drawn ones are of the form and end with it."""
    other = Decoder(oneblock.get_spec("llama", vocab=257, context=300, dim=32, n_layers=1, n_heads=2, hidden_dim=48))
    init_weights(other, 2)
    drafts = {"text": None, "itself": LLM(llm.model), "another": LLM(other)}
    guessing = LLM(llm.model, llm.tokenizer, generation_config=llm.generation_config)
    guessing.set_speculative_decoding(4, drafts[by])
    for shape in ({"schema": PERSON}, *({"regex": regex} for regex in REGEXES), {"choices": CHOICES}, {"grammar": SUM}):
        how = {"max_tokens": 200, **shape}
        expected = llm.generate("aaaa ", temperature=0, **how)
        found = guessing.generate("aaaa ", temperature=0, **how)
        assert (found.ids, found.text, found.finish_reason) == (expected.ids, expected.text, expected.finish_reason)
        if "regex" in shape:
            for seed in range(10):
                drawn = guessing.generate("aaaa ", seed=seed, **how)
                assert drawn.finish_reason == "stop"
                assert re.fullmatch(str(shape["regex"]), drawn.text or "")
    assert guessing.speculative_stats.accepted <= guessing.speculative_stats.drafted
