"""The Python API on a real trained model, and on folders without a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import oneblock
from oneblock import OneblockError
from oneblock.infer.chat import Conversation
from oneblock.infer.llm import LLM
from oneblock.model import Decoder, init_weights
from oneblock.store import save_model


@pytest.fixture(scope="module")
def folder(data: Path) -> Path:
    return data / "weights/stories260k"


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return oneblock.load(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with no tokenizer."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    model = Decoder(oneblock.get_spec("llama", vocab=50, context=40))
    init_weights(model, 1)
    save_model(folder, model)
    return folder


def test_a_trained_llama_writes_its_200_tokens(llm: LLM, folder: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text("utf-8"))
    found = llm.generate(expected["prompt_ids"], max_tokens=200, temperature=0, ignore_eos=True)
    assert found.ids == expected["greedy_ids"]
    assert found.text == expected["greedy_text"]
    assert llm.generate("", max_tokens=200, temperature=0, ignore_eos=True).ids == expected["greedy_ids"]


def test_cached_logits_are_the_full_ones(llm: LLM) -> None:
    found = llm.generate("Once upon a time", max_tokens=60, temperature=0)
    with torch.no_grad():
        full = llm.model(torch.tensor([found.prompt_ids + found.ids]))[0].log_softmax(-1)
    n = len(found.prompt_ids)
    expected = [full[n + i - 1, id].item() for i, id in enumerate(found.ids)]
    assert found.logprobs == pytest.approx(expected, abs=1e-4)
    assert found.finish_reason == "length"


def test_one_prompt_or_many(llm: LLM) -> None:
    options: dict[str, Any] = {"max_tokens": 24, "temperature": 0}
    prompts = ["Once upon a time", "The", "Lily and Tom went to the big park. They saw"]
    together = llm.generate(prompts, **options)
    assert isinstance(together, list)
    alone = [llm.generate(prompt, **options) for prompt in prompts]
    assert [c.text for c in together] == [c.text for c in alone]
    ids = [llm.encode(prompt) for prompt in prompts]
    assert [c.ids for c in llm.generate(ids, **options)] == [c.ids for c in alone]
    assert llm.generate(ids[0], **options).ids == alone[0].ids
    assert llm.generate([]) == []


def test_seeds_make_samples_repeatable(llm: LLM) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 1.2, "top_p": 0.9}
    first = llm.generate("The cat", seed=7, **options).ids
    assert llm.generate("The cat", seed=7, **options).ids == first
    assert any(llm.generate("The cat", seed=s, **options).ids != first for s in range(3))
    rows = llm.generate(["The cat"] * 2, seed=[7, 7], **options)
    assert [row.ids for row in rows] == [first, first]


def test_stream_adds_up(llm: LLM) -> None:
    pieces = list(llm.stream("Once upon", max_tokens=40, temperature=0))
    assert len(pieces) > 20
    assert "".join(pieces) == llm.generate("Once upon", max_tokens=40, temperature=0).text
    ids = list(llm.stream_ids("Once upon", max_tokens=9, temperature=0))
    assert ids == llm.generate("Once upon", max_tokens=9, temperature=0).ids


def test_stop_texts_are_cut_and_never_shown_in_part(llm: LLM) -> None:
    whole = llm.generate("Once upon a time", max_tokens=60, temperature=0).text or ""
    stop = whole[30:37]
    found = llm.generate("Once upon a time", max_tokens=60, temperature=0, stop=stop)
    assert found.text == whole[: whole.index(stop)]
    assert found.finish_reason == "stop"
    shown = list(llm.stream("Once upon a time", max_tokens=60, temperature=0, stop=[stop, "never to be seen"]))
    assert "".join(shown) == found.text


def test_stop_ids_and_eos(llm: LLM) -> None:
    ids = llm.generate("Once upon a time", max_tokens=30, temperature=0).ids
    found = llm.generate("Once upon a time", max_tokens=30, temperature=0, stop_ids=[ids[5]])
    assert (found.ids, found.finish_reason) == (ids[: ids.index(ids[5]) + 1], "stop")
    assert llm.eos_ids == {2}
    forced = llm.generate("The end.", max_tokens=5, logit_bias={2: 1e9})
    assert (forced.ids, forced.text, forced.finish_reason) == ([2], "", "stop")
    assert len(llm.generate("The end.", max_tokens=5, logit_bias={2: 1e9}, ignore_eos=True).ids) == 5


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", torch.bfloat16])
def test_dtypes(folder: Path, dtype: Any) -> None:
    found = oneblock.load(folder, dtype=dtype)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    assert found.model.embed.weight.dtype == expected
    assert len(found.generate("Once", max_tokens=4, temperature=0).ids) == 4


def test_save_is_a_folder_again(llm: LLM, folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    llm.save(tmp_path / "again")
    again = oneblock.load(tmp_path / "again")
    assert again.spec == llm.spec
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.generate("Once", max_tokens=30, temperature=0) == llm.generate("Once", max_tokens=30, temperature=0)


def test_without_a_tokenizer(plain: Path, tmp_path: Path) -> None:
    bare = oneblock.load(str(plain))
    assert bare.tokenizer is None
    found = bare.generate([1, 2, 3], max_tokens=5, temperature=0)
    assert (found.text, len(found.ids)) == (None, 5)
    assert str(found) == str(found.ids)
    bare.save(tmp_path / "out")
    assert oneblock.load(tmp_path / "out").generate([1, 2, 3], max_tokens=5, temperature=0) == found
    for call in (
        lambda: bare.generate("text"),
        lambda: bare.stream([1]),
        lambda: bare.chat([]),
        lambda: bare.request(stop="x"),
    ):
        with pytest.raises(OneblockError, match="tokenizer"):
            call()


BAD: list[tuple[Any, dict[str, Any], str]] = [
    ([1], {"temperature": -1.0}, "temperature"),
    ([1], {"top_p": 0.0}, "top_p"),
    ([1], {"top_k": -1}, "top_k"),
    ([1] * 40, {}, "the prompt has 40 tokens and the model's context 40"),
    ([], {}, "the prompt is empty"),
    ([50], {}, "token id 50 is not in the vocabulary"),
    ([1], {"max_tokens": 0}, "max_tokens is 0"),
    ([1], {"seed": [1, 2]}, "seed must be one whole number"),
    ([1], {"logit_bias": {99: 1.0}}, "logit_bias for 99"),
]


@pytest.mark.parametrize(("prompt", "options", "message"), BAD, ids=[b[2][:20] for b in BAD])
def test_what_a_user_can_mend_is_one_line(plain: Path, prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OneblockError, match=f"^[^\n]*{message}[^\n]*$"):
        oneblock.load(plain).generate([prompt] if prompt == [] else prompt, **options)


def test_an_unknown_option_is_named(plain: Path) -> None:
    with pytest.raises(TypeError, match="unknown argument 'temprature'"):
        oneblock.load(plain).generate([1], temprature=0.5)
    with pytest.raises(OneblockError, match="dtype"):
        oneblock.load(plain, dtype="float13")
    with pytest.raises(OneblockError, match="no/such"):
        oneblock.load("./no/such/folder")


def test_a_conversation_reads_only_what_is_new(llm: LLM) -> None:
    talk = Conversation(llm, llm.request(max_tokens=12, temperature=0.0))
    first = "".join(talk.say("Once upon a time"))
    fed: list[int] = []
    hook = llm.model.embed.register_forward_hook(lambda module, args, y: fed.append(args[0].shape[1]))
    second = "".join(talk.say("The dog was"))
    hook.remove()
    assert fed[0] < 16  # not the first turn again
    prompt = llm.encode("Once upon a time") + llm.generate("Once upon a time", max_tokens=12, temperature=0).ids
    assert llm.tokenizer is not None
    whole = prompt + llm.tokenizer.encode("\nThe dog was", bos=False)
    assert second == llm.generate(whole, max_tokens=12, temperature=0).text
    assert [m["content"] for m in talk.messages] == ["Once upon a time", first, "The dog was", second]


def test_import_is_light_and_names_are_there() -> None:
    assert oneblock.get_spec("gpt2").dim == 768
    assert oneblock.plan_model(oneblock.get_spec("gpt2"), context=1024).params_total == 124_439_808
    assert {"load", "LLM", "spec", "plan"} <= set(dir(oneblock))
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = oneblock.nothing_here
