"""Batch inference from a file: batched == unbatched, each prompt once, across kills and full disks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import oneblock
from oneblock import OneblockError, cli
from oneblock.infer import batch
from oneblock.infer.batch import Output, Reader, Result, choose_batch_size, complete_file, generate_results
from oneblock.infer.generate import Sequences
from oneblock.infer.llm import LLM
from oneblock.model import Decoder, init_weights
from oneblock.spec import FAMILIES
from oneblock.text.train import byte_level

END = 256


@pytest.fixture(scope="module")
def llm() -> LLM:
    model = Decoder(oneblock.get_spec("llama", vocab=257, context=200, dim=32, n_layers=2, n_heads=2, hidden_dim=48))
    init_weights(model, 1)
    return LLM(model, byte_level(), generation_config={"eos_token_id": END})


@pytest.fixture(scope="module")
def folder(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batch") / "model"
    llm.save(folder)
    return folder


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def random_rows(n: int) -> list[dict[str, Any]]:
    """Prompts of many lengths, half of them greedy, with different limits and options."""
    rows: list[dict[str, Any]] = []
    for i in range(n):
        row = {"id": f"p{i}", "prompt": "ab " * (i * 7 % 13) + "x", "max_tokens": 3 + i * 11 % 40, "seed": i}
        rows.append(row | ({"temperature": 0} if i % 2 else {"temperature": 1.3, "top_p": 0.95}))
    rows[3] |= {"stop": ["a"], "repetition_penalty": 1.3}
    rows[4] = {"id": 4, "prompt": [1, 2, 3], "max_tokens": 9, "temperature": 0}
    rows[5] |= {"regex": "[ab]{5,9}"}
    rows[6] |= {"choices": ["yes", "no"], "logit_bias": {"110": 50}}
    return rows


def generate_unbatched(llm: LLM, row: dict[str, Any]) -> tuple[Any, ...]:
    options = {name: value for name, value in row.items() if name not in ("id", "prompt")}
    if "logit_bias" in options:
        options["logit_bias"] = {int(id): bias for id, bias in options["logit_bias"].items()}
    completion = llm.generate(row["prompt"], **options)
    return completion.text, completion.ids, completion.finish_reason, len(completion.prompt_ids)


# ------------------------------------------------------------------ the replies


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_batched_equals_unbatched(llm: LLM, tmp_path: Path, size: int) -> None:
    pytest.importorskip("llguidance")
    rows = random_rows(24)
    complete_file(llm, write_jsonl(tmp_path / "in", rows), tmp_path / "out", size, {})
    results = {row["id"]: row for row in read_jsonl(tmp_path / "out")}
    assert len(read_jsonl(tmp_path / "out")) == len(results) == 24
    for row in rows:
        result = results[row["id"]]
        assert (result["text"], result["ids"], result["finish_reason"], result["prompt_tokens"]) == generate_unbatched(
            llm, row
        )


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "phi3", "mixtral", "gpt_oss"])
def test_active_rows_survive_a_refill(name: str) -> None:
    """Sliding windows, learned positions, LongRoPE, experts."""
    model = Decoder(FAMILIES[name]())
    init_weights(model, 3)
    llm = LLM(model)
    rows = [{"prompt": [(i * j) % 50 for j in range(1, 4 + i * 5)], "max_tokens": 2 + i * 7 % 30} for i in range(12)]
    jobs = [Reader(llm, {"seed": 0}).parse_job(n, row) for n, row in enumerate(rows, 1)]
    results = {result.id: result.ids for result in generate_results(llm, jobs, 4)}
    expected = [llm.generate(r["prompt"], max_tokens=r["max_tokens"], seed=n) for n, r in enumerate(rows)]
    assert [results[n] for n in range(1, 13)] == [reply.ids for reply in expected]


def test_batches_are_refilled(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    step = Sequences.step
    monkeypatch.setattr(Sequences, "step", lambda self: (sizes.append(len(self.rows)), step(self))[1])
    rows = [{"prompt": "x", "max_tokens": 5 + i * 7 % 50, "ignore_eos": True} for i in range(24)]
    jobs = [Reader(llm, {"seed": 0}).parse_job(n, row) for n, row in enumerate(rows, 1)]
    assert len(list(generate_results(llm, jobs, 8))) == 24
    refills = [i for i in range(1, len(sizes)) if sizes[i] > sizes[i - 1]]
    assert len(refills) > 2
    assert max(sizes) == 8
    assert min(sizes[: refills[-1]]) > 4


def test_a_reply_without_allowed_tokens_is_an_error_row(llm: LLM, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    rows = random_rows(8)
    rows[2] = {"id": "bad", "prompt": "x", "choices": ["a"], "logit_bias": {str(ord("a")): -1e999}}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "in").write_text(text)
    complete_file(llm, tmp_path / "in", tmp_path / "out", 4, {})
    results = {row["id"]: row for row in read_jsonl(tmp_path / "out")}
    assert results["bad"]["finish_reason"] == "error"
    assert "no token may follow" in results["bad"]["error"]
    assert sum("error" in row for row in results.values()) == 1
    assert results["p1"]["ids"] == generate_unbatched(llm, rows[1])[1]


def test_batch_size_follows_free_memory(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Reader(llm, {"max_tokens": 20}).parse_job(n, {"prompt": "abc"}) for n in (1, 2)]
    assert choose_batch_size(llm, jobs) == 32
    keys = 2 * oneblock.plan_model(llm.spec, 23, dtype="float32").kv_bytes
    monkeypatch.setattr(batch, "free_memory", lambda device: 2 * 7 * (keys + 16 * 257 + 64 * 3 * 32))
    assert choose_batch_size(llm, jobs) == 7
    monkeypatch.setattr(batch, "free_memory", lambda device: 1)
    assert choose_batch_size(llm, jobs) == 1


# ------------------------------------------------------------------ interruption and resumption


def test_a_killed_run_resumes(folder: Path, llm: LLM, tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": "x" * (1 + i % 9), "max_tokens": 60, "ignore_eos": True} for i in range(40)]
    source, target = write_jsonl(tmp_path / "in", rows), tmp_path / "out"
    flags = ["generate", str(folder), "--input", str(source), "--output", str(target), "--batch-size", "2"]
    flags += ["--seed", "7"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "oneblock", *flags], env=env, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while time.monotonic() < end and (not target.exists() or target.read_bytes().count(b"\n") < 6):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    complete_lines = [line for line in target.read_text("utf-8").split("\n")[:-1]]
    assert 6 <= len(complete_lines) < 40
    with target.open("a") as file:
        file.write('{"id": 40, "text": "hal')
    assert cli.main(flags) == 0
    results = read_jsonl(target)
    assert [json.dumps(row, ensure_ascii=False) for row in results[: len(complete_lines)]] == complete_lines
    assert sorted(row["id"] for row in results) == list(range(1, 41))
    for row in results:
        expected = llm.generate(rows[row["id"] - 1]["prompt"], max_tokens=60, ignore_eos=True, seed=6 + row["id"])
        assert row["ids"] == expected.ids
    before = target.read_bytes()
    assert cli.main(flags) == 0  # every prompt is done
    assert target.read_bytes() == before


def test_an_interrupt_keeps_finished_replies(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    source = write_jsonl(tmp_path / "in", random_rows(12))
    write, count = Output.write, 0

    def interrupted(self: Output, result: Result) -> None:
        nonlocal count
        write(self, result)
        count += 1
        if count == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Output, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        complete_file(llm, source, tmp_path / "out", 3, {})
    assert "5 of 12 prompts done" in capsys.readouterr().err
    monkeypatch.setattr(Output, "write", write)
    complete_file(llm, source, tmp_path / "out", 3, {})
    assert "12 of 12 prompts done (5 by earlier runs)" in capsys.readouterr().err
    assert len({row["id"] for row in read_jsonl(tmp_path / "out")}) == len(read_jsonl(tmp_path / "out")) == 12


def test_unsuitable_output_files_are_refused(llm: LLM, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in", random_rows(7))
    out = tmp_path / "out"
    for text, message in (
        ("nonsense\n", "line 1 is not a result"),
        ('{"id": "p1", "prompt": "x"}\n', "line 1 is not a result"),
        ('{"id": "p1", "finish_reason": "stop"}\n{"id": "other", "finish_reason": "stop"}\n', "no prompt 'other'"),
    ):
        out.write_text(text)
        with pytest.raises(OneblockError, match=message):
            complete_file(llm, source, out, 2, {})
        assert out.read_text() == text
    with pytest.raises(OneblockError, match="is the input"):
        complete_file(llm, source, tmp_path / "." / "in", 2, {})
    with pytest.raises(OneblockError, match="No such file"):
        complete_file(llm, source, tmp_path / "no" / "out", 2, {})
    with pytest.raises(OneblockError, match="batch_size is 0"):
        complete_file(llm, source, out, 0, {})
    out.unlink()
    first = Output(out, set())
    with pytest.raises(OneblockError, match="another process is writing it"):
        Output(out, set())
    first.close()


# ------------------------------------------------------------------ the input


MALFORMED: list[tuple[str, str]] = [
    ("{", "Expecting"),
    ("[1]", "a line must be an object"),
    ('{"prompt": "x", "temprature": 1}', "unknown key 'temprature': did you mean temperature"),
    ('{"prompt": "x", "id": 1.5}', "id is 1.5"),
    ('{"prompt": "x", "id": 1}', "id 1 is already the id of line 1"),
]


@pytest.mark.parametrize(("line", "message"), MALFORMED, ids=[b[1][:30] for b in MALFORMED])
def test_a_malformed_line_is_named_before_anything_runs(llm: LLM, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "in").write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(OneblockError, match=f"^[^\n]*in, line 2: [^\n]*{message}[^\n]*$"):
        complete_file(llm, tmp_path / "in", tmp_path / "out", 2, {})
    assert not (tmp_path / "out").exists()


REFUSED: list[tuple[str, str]] = [
    ("{}", 'give either "prompt" or "messages"'),
    ('{"prompt": "x", "messages": []}', 'give either "prompt" or "messages"'),
    ('{"prompt": 3}', "the prompt is 3, but it must be text or a list of token ids"),
    ('{"prompt": [1, "a"]}', "token id 'a' is not in the vocabulary"),
    ('{"prompt": [257]}', "token id 257 is not in the vocabulary"),
    ('{"prompt": ""}', "the prompt is empty"),
    ('{"prompt": "' + "x" * 200 + '"}', "the prompt has 200 tokens and the model's context 200"),
    ('{"prompt": "\\ud800"}', "surrogate"),
    ('{"prompt": "x", "temperature": "hot"}', "temperature is 'hot'"),
    ('{"prompt": "x", "temperature": NaN}', "temperature is nan"),
    ('{"prompt": "x", "temperature": 1e308}', "temperature is 1e+308, but it must be at least 0 and at most 1,000,000"),
    ('{"prompt": "x", "max_tokens": 0}', "max_tokens is 0"),
    ('{"prompt": "x", "max_tokens": 1.5}', "max_tokens is 1.5, but it must be an integer"),
    ('{"prompt": "x", "max_tokens": "9"}', "max_tokens is '9', but it must be an integer"),
    ('{"prompt": "x", "top_k": 2.5}', "top_k is 2.5, but it must be an integer"),
    ('{"prompt": "x", "seed": true}', "seed is True"),
    ('{"prompt": "x", "seed": 9223372036854775808}', "seed is 9223372036854775808"),
    ('{"prompt": "x", "stop": 3}', "stop is 3, but it must be a string or a list of strings"),
    ('{"prompt": "x", "stop_ids": ["a"]}', "stop_ids is ['a']"),
    ('{"prompt": "x", "logit_bias": [1]}', "logit_bias must map token ids to numbers"),
    ('{"prompt": "x", "logit_bias": {"a": 1}}', "logit_bias for 'a'"),
    ('{"prompt": "x", "logit_bias": {"999": 1}}', "logit_bias for 999"),
    (
        '{"prompt": "x", "logit_bias": {"9": 1e308}}',
        "logit_bias of 9 is 1e+308, but it must be a number of at",
    ),
    ('{"prompt": "x", "regex": "(a"}', "unclosed group"),
    ('{"messages": []}', "messages must be a list"),
    ('{"messages": [{"role": "user", "content": "Hi"}]}', "no chat template"),
]


def test_a_refused_request_is_an_error_row_and_the_others_run(llm: LLM, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    good = '{"prompt": "fine", "max_tokens": 4, "temperature": 0}\n'
    tiny = '{"prompt": "fine", "max_tokens": 4, "temperature": 1e-300, "top_p": 1e-300}\n'
    (tmp_path / "in").write_text(good + "".join(line + "\n" for line, _ in REFUSED) + tiny)
    complete_file(llm, tmp_path / "in", tmp_path / "out", 4, {"seed": 2**63 - 1})
    rows = {row["id"]: row for row in read_jsonl(tmp_path / "out")}
    assert sorted(rows) == list(range(1, len(REFUSED) + 3))
    for n, (_, message) in enumerate(REFUSED, 2):
        assert rows[n]["finish_reason"] == "error"
        assert message in rows[n]["error"]
        assert "\n" not in rows[n]["error"]
    assert rows[1]["ids"] == rows[len(REFUSED) + 2]["ids"] == llm.generate("fine", max_tokens=4, temperature=0).ids


def test_refused_defaults_end_the_run(llm: LLM, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in", [{"prompt": "x"}])
    with pytest.raises(OneblockError, match="temperature is -1"):
        complete_file(llm, source, tmp_path / "out", 2, {"temperature": -1})
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_the_output_stays_valid(folder: Path, tmp_path: Path) -> None:
    """A limit on the file size stands for the full disk: the write fails in the middle of a line."""
    resource = pytest.importorskip("resource")
    source = write_jsonl(tmp_path / "in", [{"prompt": "x", "max_tokens": 20, "ignore_eos": True} for _ in range(30)])
    flags = ["generate", str(folder), "--input", str(source), "--output", str(tmp_path / "out"), "--temperature", "0"]
    limit = 1000

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    command = [sys.executable, "-m", "oneblock", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit_file_size, check=False)
    assert ended.returncode == 1
    *_, error = ended.stderr.strip().split("\n")
    assert "File too large" in error
    assert "run the same command again: finished replies are kept" in error
    assert "Traceback" not in ended.stderr
    text = (tmp_path / "out").read_text()
    assert text.endswith("\n")
    assert 0 < len(text) <= limit
    before = read_jsonl(tmp_path / "out")
    assert cli.main(flags) == 0
    after = read_jsonl(tmp_path / "out")
    assert after[: len(before)] == before
    assert sorted(row["id"] for row in after) == list(range(1, 31))


def test_options_of_one_prompt_are_refused_with_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--prompt-cache", "x"], ["--num-speculative-tokens", "4"]):
        assert cli.main(["generate", str(folder), "--input", "in", "--output", "out", *flags]) == 1
        assert "apply to one prompt: leave them out with --input" in capsys.readouterr().err


def test_options_of_lines_override_defaults(llm: LLM, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    (tmp_path / "in").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b", "seed": 1, "regex": "z{3}"}\n')
    jobs = Reader(llm, {"seed": 5, "max_tokens": 4, "choices": ("yes", "no"), "temperature": None}).read(
        tmp_path / "in"
    )
    assert [(job.id, job.request.seeds, job.request.max_tokens) for job in jobs] == [(1, (5,), 4), (3, (1,), 4)]
    grammars = [job.request.grammar for job in jobs]
    assert [g.output.kind for g in grammars if g is not None] == ["choices", "regex"]
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(OneblockError, match="has no prompts"):
        Reader(llm, {}).read(tmp_path / "empty")
    with pytest.raises(OneblockError, match="No such file"):
        Reader(llm, {}).read(tmp_path / "none")


def test_messages_use_the_chat_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}:"
    job = Reader(LLM(llm.model, tokenizer), {}).parse_job(1, {"messages": messages})
    assert job.prompt == list(b"Hi:")


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "in", [{"prompt": "x"}, {"prompt": "yy", "max_tokens": 3}])
    base = ["generate", str(folder), "--input", str(source)]
    assert cli.main([*base, "--output", str(tmp_path / "out"), "--max-tokens", "5", "--ignore-eos"]) == 0
    assert sorted(len(row["ids"]) for row in read_jsonl(tmp_path / "out")) == [3, 5]
    assert "2 of 2 prompts done" in capsys.readouterr().err
    for flags in ([], ["--output", "x", "--prompt", "y"]):
        assert cli.main([*base, *flags]) == 1
        assert "needs --input and --output" in capsys.readouterr().err
