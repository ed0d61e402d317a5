"""The Python API on a trained model, and on folders without a tokenizer."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import oneblock
from oneblock import OneblockError
from oneblock.cli import main
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
def folder_without_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with no tokenizer."""
    folder = tmp_path_factory.mktemp("folder_without_tokenizer") / "model"
    model = Decoder(oneblock.get_spec("llama", vocab=50, context=40))
    init_weights(model, 1)
    save_model(folder, model)
    return folder


def test_greedy_reproduces_200_tokens_of_the_reference(llm: LLM, folder: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text("utf-8"))
    completion = llm.generate(expected["prompt_ids"], max_tokens=200, temperature=0, ignore_eos=True)
    assert completion.ids == expected["greedy_ids"]
    assert completion.text == expected["greedy_text"]
    assert llm.generate("", max_tokens=200, temperature=0, ignore_eos=True).ids == expected["greedy_ids"]


def test_cached_logprobs_equal_a_full_forward_pass(llm: LLM) -> None:
    completion = llm.generate("Once upon a time", max_tokens=60, temperature=0)
    with torch.no_grad():
        full = llm.model(torch.tensor([completion.prompt_ids + completion.ids]))[0].log_softmax(-1)
    n = len(completion.prompt_ids)
    expected = [full[n + i - 1, id].item() for i, id in enumerate(completion.ids)]
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)
    assert completion.finish_reason == "length"


def test_batched_equals_unbatched(llm: LLM) -> None:
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


def test_seeds_reproduce_samples(llm: LLM) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 1.2, "top_p": 0.9}
    first = llm.generate("The cat", seed=7, **options).ids
    assert llm.generate("The cat", seed=7, **options).ids == first
    assert any(llm.generate("The cat", seed=s, **options).ids != first for s in range(3))
    rows = llm.generate(["The cat"] * 2, seed=[7, 7], **options)
    assert [row.ids for row in rows] == [first, first]


def test_streamed_pieces_equal_the_reply(llm: LLM) -> None:
    pieces = list(llm.stream("Once upon", max_tokens=40, temperature=0))
    assert len(pieces) > 20
    assert "".join(pieces) == llm.generate("Once upon", max_tokens=40, temperature=0).text
    ids = list(llm.stream_ids("Once upon", max_tokens=9, temperature=0))
    assert ids == llm.generate("Once upon", max_tokens=9, temperature=0).ids


def test_stop_strings_are_removed_and_never_streamed_in_part(llm: LLM) -> None:
    full = llm.generate("Once upon a time", max_tokens=60, temperature=0).text or ""
    stop = full[30:37]
    completion = llm.generate("Once upon a time", max_tokens=60, temperature=0, stop=stop)
    assert completion.text == full[: full.index(stop)]
    assert completion.finish_reason == "stop"
    shown = list(llm.stream("Once upon a time", max_tokens=60, temperature=0, stop=[stop, "never to be seen"]))
    assert "".join(shown) == completion.text


def test_stop_ids_and_eos(llm: LLM) -> None:
    ids = llm.generate("Once upon a time", max_tokens=30, temperature=0).ids
    completion = llm.generate("Once upon a time", max_tokens=30, temperature=0, stop_ids=[ids[5]])
    assert (completion.ids, completion.finish_reason) == (ids[: ids.index(ids[5]) + 1], "stop")
    assert llm.eos_ids == {2}
    forced = llm.generate("The end.", max_tokens=5, logit_bias={2: 1e9})
    assert (forced.ids, forced.text, forced.finish_reason) == ([2], "", "stop")
    assert len(llm.generate("The end.", max_tokens=5, logit_bias={2: 1e9}, ignore_eos=True).ids) == 5


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", torch.bfloat16])
def test_dtypes(folder: Path, dtype: Any) -> None:
    completion = oneblock.load(folder, dtype=dtype)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    assert completion.model.embed.weight.dtype == expected
    assert len(completion.generate("Once", max_tokens=4, temperature=0).ids) == 4


def test_save_and_load_round_trip(llm: LLM, folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    llm.save(tmp_path / "again")
    again = oneblock.load(tmp_path / "again")
    assert again.spec == llm.spec
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.generate("Once", max_tokens=30, temperature=0) == llm.generate("Once", max_tokens=30, temperature=0)


def test_without_a_tokenizer(folder_without_tokenizer: Path, tmp_path: Path) -> None:
    llm = oneblock.load(str(folder_without_tokenizer))
    assert llm.tokenizer is None
    completion = llm.generate([1, 2, 3], max_tokens=5, temperature=0)
    assert (completion.text, len(completion.ids)) == (None, 5)
    assert str(completion) == str(completion.ids)
    llm.save(tmp_path / "out")
    assert oneblock.load(tmp_path / "out").generate([1, 2, 3], max_tokens=5, temperature=0) == completion
    for call in (
        lambda: llm.generate("text"),
        lambda: llm.stream([1]),
        lambda: llm.chat([]),
        lambda: llm.build_request(stop="x"),
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
    ([1], {"seed": [1, 2]}, "seed has 2 values for 1 prompts"),
    ([1], {"logit_bias": {99: 1.0}}, "logit_bias for 99"),
    ([1], {"logit_bias": {9: 1e308}}, "logit_bias of 9 is 1e.308"),
    ([1], {"max_tokens": 1.5}, "max_tokens is 1.5, but it must be an integer"),
    ([1], {"max_tokens": True}, "max_tokens is True"),
    ([1], {"temperature": float("nan")}, "temperature is nan"),
    ([1], {"temperature": float("inf")}, "temperature is inf"),
    ([1], {"top_k": 2.5}, "top_k is 2.5, but it must be an integer"),
    ([1], {"seed": 2**63}, "seed is 9223372036854775808"),
    ([1], {"seed": -1}, "seed is -1"),
    ([1], {"seed": 0.5}, "seed is 0.5, but it must be an integer"),
    ([1], {"top_logprobs": -1}, "top_logprobs is -1"),
    ([1], {"stop_ids": ["a"]}, "stop_ids is .'a'.*list of token ids"),
    ([1], {"stop": 5}, "stop is 5"),
    ([{"role": "user", "content": "Hello"}], {}, "use llm.chat"),
    ({"role": "user", "content": "Hello"}, {}, "it must be text or a list of token ids"),
    (5, {}, "the prompt is 5"),
    ([1.5], {}, "the prompt is 1.5"),
    ({1, 2}, {}, "the prompt is {1, 2}"),
    ([1], {"ignore_eos": "no"}, "ignore_eos is 'no'"),
]


@pytest.mark.parametrize(("prompt", "options", "message"), BAD, ids=[b[2][:20] for b in BAD])
def test_refused_options_are_one_line_errors(
    folder_without_tokenizer: Path, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OneblockError, match=f"^[^\n]*{message}[^\n]*$"):
        oneblock.load(folder_without_tokenizer).generate([prompt] if prompt == [] else prompt, **options)


def test_unknown_options_are_named(folder_without_tokenizer: Path) -> None:
    with pytest.raises(TypeError, match="unknown argument 'temprature'"):
        oneblock.load(folder_without_tokenizer).generate([1], temprature=0.5)
    with pytest.raises(OneblockError, match="dtype"):
        oneblock.load(folder_without_tokenizer, dtype="float13")
    with pytest.raises(OneblockError, match="no/such"):
        oneblock.load("./no/such/folder")


def test_a_conversation_prefills_only_new_tokens(llm: LLM) -> None:
    conversation = Conversation(llm, llm.build_request(max_tokens=12, temperature=0.0))
    first = "".join(conversation.stream_reply("Once upon a time"))
    fed_tokens: list[int] = []
    hook = llm.model.embed.register_forward_hook(lambda module, args, y: fed_tokens.append(args[0].shape[1]))
    second = "".join(conversation.stream_reply("The dog was"))
    hook.remove()
    assert fed_tokens[0] < 16  # not the first turn again
    prompt = llm.encode("Once upon a time") + llm.generate("Once upon a time", max_tokens=12, temperature=0).ids
    assert llm.tokenizer is not None
    full = prompt + llm.tokenizer.encode("\nThe dog was", bos=False)
    assert second == llm.generate(full, max_tokens=12, temperature=0).text
    assert [m["content"] for m in conversation.messages] == ["Once upon a time", first, "The dog was", second]


def test_public_names() -> None:
    assert oneblock.get_spec("gpt2").dim == 768
    assert oneblock.plan_model(oneblock.get_spec("gpt2"), context=1024).params_total == 124_439_808
    assert {"load", "LLM", "get_spec", "plan_model"} <= set(dir(oneblock))
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = oneblock.nothing_here


# ------------------------------------------------------------------ settings, devices, copies, threads


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("compile", "yes", "compile is 'yes', but it must be auto or on or off"),
        ("compile", True, "compile is True"),
        ("kv_cache_dtype", 4, "kv_cache_dtype is 4, but it must be auto or int8"),
        ("prompt_cache", 3, "prompt_cache is 3, but it must be the path of a file"),
    ],
)
def test_settings_are_checked(llm: LLM, name: str, value: Any, message: str) -> None:
    with pytest.raises(OneblockError, match=f"^{message}[^\n]*$"):
        setattr(llm, name, value)


@pytest.mark.parametrize("n", [-1, 1.5, True, 1000])
def test_num_speculative_tokens_is_checked(llm: LLM, n: Any) -> None:
    with pytest.raises(OneblockError, match=f"^num_speculative_tokens is {n}, but it must be an integer, at least 0"):
        llm.set_speculative_decoding(n)


def test_draft_models_are_llms(llm: LLM) -> None:
    with pytest.raises(OneblockError, match=r"^draft_model is 'path/to/model', but it must be an LLM"):
        llm.set_speculative_decoding(3, "path/to/model")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("device", ["mps", "tpu", "meta", "cuda:99", "", None, 3])
def test_missing_devices_are_one_line_errors(folder: Path, device: Any) -> None:
    with pytest.raises(OneblockError, match=r"^device '\S*' is not available here; available: cpu[^\n]*$"):
        oneblock.load(folder, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_the_command_refuses_missing_devices(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(folder), "--device", "cuda"]) == 1
    assert capsys.readouterr().err == "error: device 'cuda' is not available here; available: cpu\n"


@pytest.mark.parametrize("copy_llm", [pickle.dumps, copy.copy, copy.deepcopy])
def test_pickling_and_copying_are_refused(llm: LLM, copy_llm: Callable[[LLM], object]) -> None:
    with pytest.raises(OneblockError, match=r"^an LLM cannot be pickled or copied: [^\n]*load it again$"):
        copy_llm(llm)


@pytest.mark.parametrize("num_speculative_tokens", [0, 4])
def test_concurrent_calls_equal_sequential_calls(folder: Path, num_speculative_tokens: int) -> None:
    llm = oneblock.load(folder)
    llm.set_speculative_decoding(num_speculative_tokens)
    prompts = ["Once upon a time", "Lily and Tom", "The dog was", "One day, a little girl", "He said"]
    options: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.2}]
    calls = [(prompt, {"max_tokens": 40, **option}) for prompt in prompts for option in options]
    expected = [llm.generate(prompt, **option).ids for prompt, option in calls]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(llm.generate, prompt, **option) for prompt, option in calls]
        assert [job.result().ids for job in jobs] == expected


def test_interleaved_streams_equal_separate_ones(llm: LLM) -> None:
    prompts = ["Once upon a time", "The dog was"]
    streams = [llm.stream_ids(prompt, max_tokens=20, temperature=0) for prompt in prompts]
    ids = list(zip(*streams, strict=True))
    assert [list(x) for x in zip(*ids, strict=True)] == [
        llm.generate(prompt, max_tokens=20, temperature=0).ids for prompt in prompts
    ]


def test_system_prompt_without_chat_template_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(folder), "--system", "Answer briefly."]) == 1
    assert "no chat template, so a system prompt has no effect: leave --system out" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_rope_scaling_without_context_is_refused(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ["--prompt", "Once"] if command == "generate" else []
    assert main([command, str(folder), *prompt, "--rope-scaling", "linear"]) == 1
    assert "--rope-scaling has no effect without --context" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ("--max-tokens", "0"),
        ("--temperature", "nan"),
        ("--temperature", "-1"),
        ("--top-p", "0"),
        ("--top-k", "-1"),
        ("--min-p", "1.5"),
        ("--repetition-penalty", "0"),
        ("--frequency-penalty", "inf"),
        ("--seed", str(2**63)),
        ("--batch-size", "0"),
        ("--num-speculative-tokens", "65"),
        ("--context", "0"),
        ("--ids", "-1"),
    ],
    ids=" ".join,
)
def test_flags_out_of_range_are_one_line_errors(
    flags: tuple[str, str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(folder), *flags]) == 2
    err = capsys.readouterr().err
    assert f"{flags[0][2:].replace('-', '_')} is " in err
    assert err.count("\n") == 1
