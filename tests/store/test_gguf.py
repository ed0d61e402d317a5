"""GGUF: round trips, the gguf library and llama.cpp as references, block types, tokenizers, damaged files."""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

gguf = pytest.importorskip("gguf")

import oneblock
from oneblock.cli import main
from oneblock.errors import OneblockError
from oneblock.infer.llm import LLM
from oneblock.model import Decoder
from oneblock.spec import FAMILIES, DynamicNTK, LinearScaling, Llama3Scaling, LongRope, Rope, Spec, Yarn
from oneblock.spec.build import longrope_attention_factor, yarn_attention_factor
from oneblock.store.gguf import load_gguf, save_gguf
from oneblock.store.gguf.header import read_header
from oneblock.store.gguf.read import BLOCK_CODES
from oneblock.store.load import Checkpoint
from oneblock.text import Tokenizer, byte_level, characters, train_bpe

TINY: dict[str, Any] = {"vocab": 300, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "context": 128}
GROUPED = TINY | {"n_kv_heads": 2}
WIDE = GROUPED | {"head_dim": 16}
LLAMA3 = Rope(500_000.0, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))
FACTORS = (1.0, 1.1, 1.5, 2.0)
LONGROPE = Rope(10_000.0, scaling=LongRope(FACTORS, (1.0, 2.0, 4.0, 8.0), 512, longrope_attention_factor(2, 512)))
SPECS = {
    "llama": FAMILIES["llama"](**WIDE),
    "llama-tied-biased": FAMILIES["llama"](**GROUPED, tied=True, attention_bias=True, mlp_bias=True, norm_eps=1e-6),
    "llama-multi-head": FAMILIES["llama"](**TINY),
    "llama3": FAMILIES["llama"](**WIDE, rope=LLAMA3),
    "llama3-other": FAMILIES["llama"](**WIDE, rope=Rope(100.0, scaling=Llama3Scaling(4.0, 1.0, 2.0, 64))),
    "llama-divided": FAMILIES["llama"](**GROUPED, rope=Rope(1e4, scaling=LongRope(FACTORS, FACTORS, 128))),
    "llama-linear": FAMILIES["llama"](**WIDE, rope=Rope(1e4, scaling=LinearScaling(2.5))),
    "mistral": FAMILIES["mistral"](**WIDE, window=9),
    "mistral-no-window": FAMILIES["mistral"](**WIDE, window=None),
    "qwen2": FAMILIES["qwen2"](**GROUPED, window=None, rope=Rope(1e6)),
    "qwen2-yarn": FAMILIES["qwen2"](
        **GROUPED, window=None, rope=Rope(1e6, scaling=Yarn(4.0, 64, attention_factor=yarn_attention_factor(4.0)))
    ),
    "qwen3": FAMILIES["qwen3"](**WIDE, tied=True),
    "mixtral": FAMILIES["mixtral"](**WIDE, n_experts=5),
    "mixtral-window": FAMILIES["mixtral"](**GROUPED, n_experts=4, top_k=1, window=9),
    "qwen3_moe": FAMILIES["qwen3_moe"](**WIDE, expert_hidden_dim=32, n_experts=6, top_k=3, renormalize=True, tied=True),
    "gemma": FAMILIES["gemma"](**WIDE),
    "gemma2": FAMILIES["gemma2"](**WIDE, query_scalar=16, window=9),
    "gemma3": FAMILIES["gemma3"](**(WIDE | {"n_layers": 7}), query_scalar=16, window=9),
    "gemma3-every-other": FAMILIES["gemma3"](**WIDE, query_scalar=16, window=9, sliding=(True, False, True)),
    "gemma3-linear": FAMILIES["gemma3"](**WIDE, query_scalar=16, window=9, rope=Rope(1e6, scaling=LinearScaling(8.0))),
    "phi3": FAMILIES["phi3"](**GROUPED),
    "phi3-window": FAMILIES["phi3"](**GROUPED, window=9),
    "phi3-longrope": FAMILIES["phi3"](**(GROUPED | {"context": 1024}), rope=LONGROPE),
    "phi3-part": FAMILIES["phi3"](**(GROUPED | {"dim": 64}), rope=Rope(1e4, dim=12)),
    "gpt2": FAMILIES["gpt2"](**TINY),
    "gpt2-untied": FAMILIES["gpt2"](**TINY, tied=False),
}


def random_model(spec: Spec) -> Decoder:
    """A model with bfloat16-representable weights: Gemma's norm weights are stored plus one, which rounds others."""
    generator = torch.Generator().manual_seed(0)
    model = Decoder(spec)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.empty(p.shape).normal_(generator=generator).bfloat16())
    return model


def same(a: Decoder, b: Decoder) -> bool:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def llama_cpp_model(file: Path, **options: Any) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, about files that it leaves open
        return llama_cpp.Llama(str(file), n_threads=1, verbose=False, **options)


# ------------------------------------------------------------------ round trips


def written(folder: Path, name: str, type: str | None = "f32", tokenizer: Tokenizer | None = None) -> Path:
    kind = {"gemma3": "gemma3_text"}.get(name.split("-")[0], name.split("-")[0])
    model = random_model(SPECS[name])
    save_gguf(folder / "model.gguf", Checkpoint(model, model.spec, {"model_type": kind}), tokenizer, type)
    return folder / "model.gguf"


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("type", ["f32", "bf16"])
def test_round_trips_are_bit_exact(name: str, type: str, tmp_path: Path) -> None:
    file, model = written(tmp_path, name, type), random_model(SPECS[name])
    checkpoint, tokenizer = load_gguf(file, dtype="float32")
    assert tokenizer is None
    assert checkpoint.spec == model.spec
    assert same(checkpoint.model, model)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(checkpoint.model(ids), model(ids))
    save_gguf(tmp_path / "again" / "model.gguf", checkpoint, type=type)
    assert (tmp_path / "again" / "model.gguf").read_bytes() == file.read_bytes()


def test_the_gguf_library_reads_our_files(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(written(tmp_path, "llama3"))
    metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF")}
    assert (metadata["general.architecture"], metadata["general.file_type"], metadata["llama.block_count"]) == (
        "llama",
        0,
        3,
    )
    assert (metadata["llama.attention.head_count"], metadata["llama.attention.head_count_kv"]) == (4, 2)
    assert (metadata["llama.attention.key_length"], metadata["llama.rope.dimension_count"]) == (16, 16)
    assert (metadata["llama.rope.freq_base"], metadata["llama.vocab_size"]) == (500_000.0, 300)
    model, found = random_model(SPECS["llama3"]), {t.name: t.data for t in reader.tensors}
    wq = model.blocks[1].attn.wq.weight.detach()
    ours = wq.reshape(4, 2, 8, 32).transpose(1, 2).reshape(64, 32)  # each head's halves as neighbours
    assert np.array_equal(found["blk.1.attn_q.weight"], ours.numpy())
    assert np.array_equal(found["blk.1.attn_v.weight"], model.blocks[1].attn.wv.weight.detach().numpy())
    assert found["rope_freqs.weight"][[0, -1]].tolist() == [1.0, 8.0]
    assert {"token_embd.weight", "output.weight", "output_norm.weight"} <= found.keys()


@pytest.mark.parametrize(("name", "tensors"), [("phi3", ("attn_qkv", "ffn_up")), ("gpt2", ("attn_qkv", "attn_norm"))])
def test_fused_tensors_stay_fused(name: str, tensors: tuple[str, ...], tmp_path: Path) -> None:
    header = read_header(written(tmp_path, name))
    assert header.metadata["general.architecture"] == name
    assert {f"blk.2.{tensor}.weight" for tensor in tensors} <= header.tensors.keys()
    rows = {"phi3": 32 + 2 * 16, "gpt2": 3 * 32}[name]
    assert header.tensors["blk.0.attn_qkv.weight"].shape == (rows, 32)


def test_gemma_norm_weights_are_stored_plus_one(tmp_path: Path) -> None:
    found = {t.name: t.data for t in gguf.GGUFReader(written(tmp_path, "gemma3")).tensors}
    model = random_model(SPECS["gemma3"])
    assert np.array_equal(found["output_norm.weight"], 1 + model.norm.weight.detach().numpy())
    assert np.array_equal(found["blk.6.attn_q_norm.weight"], 1 + model.blocks[6].attn.q_norm.weight.detach().numpy())


@pytest.mark.parametrize(
    ("type", "stored", "vocabulary", "bound"),
    [
        ("f16", "F16", "F16", 2**-11),
        ("q8_0", "Q8_0", "Q8_0", 1 / 254 + 2**-10),
        ("q4_0", "Q4_0", "Q8_0", 1 / 8 + 2**-9),
    ],
)
def test_quantization_error_is_bounded(type: str, stored: str, vocabulary: str, bound: float, tmp_path: Path) -> None:
    file = written(tmp_path, "qwen3", type)
    kinds = {name: entry.dtype for name, entry in read_header(file).tensors.items()}
    assert kinds["blk.0.attn_q.weight"] == stored
    assert kinds["token_embd.weight"] == vocabulary
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.0.attn_q_norm.weight"] == "F32"
    model, (checkpoint, _) = random_model(SPECS["qwen3"]), load_gguf(file, dtype="float32")
    for (name, ours), theirs in zip(model.state_dict().items(), checkpoint.model.state_dict().values(), strict=True):
        rows = (-1, 32) if ours.numel() % 32 == 0 else (1, -1)
        blocks, error = ours.reshape(rows), (ours - theirs).reshape(rows).abs()
        assert (error <= blocks.abs().amax(1, keepdim=True) * (0 if ours.dim() == 1 else bound)).all(), name
    asked = load_gguf(file)[0].model.embed.weight.dtype
    assert asked == (torch.float16 if type == "f16" else torch.bfloat16)


def test_rows_that_are_not_whole_blocks_become_f16(tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"](**(TINY | {"hidden_dim": 40})))
    save_gguf(tmp_path / "m.gguf", model, type="q8_0")
    header = read_header(tmp_path / "m.gguf")
    assert header.tensors["blk.0.ffn_down.weight"].dtype == "F16"
    assert header.tensors["blk.0.ffn_up.weight"].dtype == "Q8_0"


def test_the_default_type_is_the_models_dtype(tmp_path: Path) -> None:
    save_gguf(tmp_path / "m.gguf", random_model(SPECS["llama"]).bfloat16())
    assert read_header(tmp_path / "m.gguf").tensors["token_embd.weight"].dtype == "BF16"
    assert load_gguf(tmp_path / "m.gguf")[0].model.norm.weight.dtype == torch.bfloat16
    with pytest.raises(OneblockError, match="type 'q2' is not supported; choose one of f32"):
        save_gguf(tmp_path / "m.gguf", random_model(SPECS["llama"]), type="q2")


@pytest.mark.parametrize("kind", BLOCK_CODES)
def test_every_block_type_is_dequantized(kind: str, tmp_path: Path) -> None:
    """A file of random blocks written by the gguf library, against the library's dequantization."""
    number, columns = gguf.GGMLQuantizationType[kind], 256
    spec = FAMILIES["llama"](**(TINY | {"dim": columns, "hidden_dim": columns, "n_layers": 1}))
    save_gguf(tmp_path / "plain.gguf", random_model(spec))
    plain = read_header(tmp_path / "plain.gguf")
    writer = gguf.GGUFWriter(tmp_path / "blocks.gguf", "llama")
    for key, value in plain.metadata.items():
        if key != "general.architecture":
            kinds = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
            writer.add_key_value(key, value, kinds[type(value)])
    rng, blocks = np.random.default_rng(0), dict[str, np.ndarray]()
    for name, entry in plain.tensors.items():
        if len(entry.shape) == 1:
            writer.add_tensor(name, np.ones(entry.shape, np.float32))
            continue
        block, block_size = gguf.GGML_QUANT_SIZES[number]
        data = rng.integers(0, 256, (*entry.shape[:-1], entry.shape[-1] // block, block_size), np.uint8)
        for place in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, (0, 2)):
            data[..., place + 1] = data[..., place + 1] & 0x3B  # scales that are finite
        blocks[name] = data.reshape(*entry.shape[:-1], -1)
        writer.add_tensor(name, blocks[name], raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = load_gguf(tmp_path / "blocks.gguf", dtype="float32")[0].model
    for name, ours in (("token_embd", model.embed), ("blk.0.ffn_up", model.blocks[0].mlp.up)):
        expected = gguf.quants.dequantize(blocks[f"{name}.weight"], number)
        assert np.isfinite(expected).all()
        assert np.array_equal(ours.weight.detach().numpy(), expected)
    q = gguf.quants.dequantize(blocks["blk.0.attn_q.weight"], number).reshape(4, 32, 2, 256)
    assert np.array_equal(model.blocks[0].attn.wq.weight.detach().numpy(), q.swapaxes(1, 2).reshape(256, 256))


def test_unquantized_weights_are_memory_mapped(tmp_path: Path) -> None:
    file = written(tmp_path, "qwen3")
    before = file.read_bytes()
    model = load_gguf(file)[0].model
    places = [p.data_ptr() for p in model.parameters()]
    assert max(places) - min(places) < len(before)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert file.read_bytes() == before


def test_a_file_is_saved_as_a_folder(tmp_path: Path) -> None:
    llm = oneblock.load(written(tmp_path, "gemma2"))
    llm.save(tmp_path / "folder")
    assert same(oneblock.load(tmp_path / "folder").model, random_model(SPECS["gemma2"]))


# ------------------------------------------------------------------ models that GGUF cannot express

REFUSED = {
    "hidden_act": FAMILIES["llama"](**TINY, act="gelu"),
    "Dynamic": FAMILIES["llama"](**TINY, rope=Rope(1e4, scaling=DynamicNTK(2.0, 128))),
    "query_pre_attn_scalar 11": FAMILIES["gemma2"](**WIDE, query_scalar=11),
    "layer_types": FAMILIES["gemma2"](**WIDE, query_scalar=16, sliding=(True, False, False)),
    "attention_bias": FAMILIES["qwen3"](**WIDE, attention_bias=True),
    "scale_attn_by_inverse_layer_idx": FAMILIES["gpt2"](**TINY, scale_by_depth=True),
    "olmo2 model": FAMILIES["olmo2"](**TINY),
}


@pytest.mark.parametrize("part", REFUSED)
def test_a_model_that_gguf_cannot_express_is_refused(part: str, tmp_path: Path) -> None:
    with pytest.raises(OneblockError, match=part):
        save_gguf(tmp_path / "m.gguf", Decoder(REFUSED[part]))
    assert list(tmp_path.iterdir()) == []


def test_numbers_too_large_for_f16_are_refused(tmp_path: Path) -> None:
    model = random_model(SPECS["llama"])
    with torch.no_grad():
        model.embed.weight[3, 4] = 70_000
    with pytest.raises(OneblockError, match=r"'token_embd.weight' holds 70000, too large for f16"):
        save_gguf(tmp_path / "m.gguf", model, type="f16")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OneblockError, match="is a folder; name the file"):
        save_gguf(tmp_path, model)


# ------------------------------------------------------------------ tokenizers

TEXTS = [
    "Hello world",
    "  odd   spaces \n\n\t tabs\r\nand\u00a0no-break  ",
    "日本語 中文 😀👩‍👧 é don't I'LL 12345678 3.14",
    "def f(x):\n    return x ** 2  # ok\n\n",
    "a" * 101 + " " * 55 + "ab" * 30,
    "<|endoftext|> <s> </s> <|im_start|> [INST] <unk> <0x41> <tool_call>",
    "",
]


def round_trip(tokenizer: Tokenizer, folder: Path, rows: int | None = None) -> tuple[Tokenizer, dict[str, Any]]:
    spec = FAMILIES["llama"](
        vocab=rows or tokenizer.vocab_size, dim=4, n_heads=2, hidden_dim=4, n_layers=1, context=8, tied=True
    )
    save_gguf(folder / "m.gguf", random_model(spec), tokenizer)
    again = load_gguf(folder / "m.gguf")[1]
    assert again is not None
    return again, read_header(folder / "m.gguf").metadata


@pytest.mark.parametrize(
    ("file", "kind", "pre"),
    [
        ("tokenizers/llama2", "llama", "default"),
        ("tokenizers/llama3", "gpt2", "llama-bpe"),
        ("tokenizers/gpt2", "gpt2", "gpt-2"),
        ("tokenizers/qwen2_5", "gpt2", "qwen2"),
        pytest.param("tokenizers/tiktoken/cl100k_base.tiktoken", "gpt2", "dbrx", marks=pytest.mark.slow),
        pytest.param("tokenizers/tiktoken/o200k_base.tiktoken", "gpt2", "gpt-4o", marks=pytest.mark.slow),
        ("weights/stories260k", "llama", "default"),
    ],
)
def test_real_tokenizers_give_the_same_ids(file: str, kind: str, pre: str, data: Path, tmp_path: Path) -> None:
    ours = Tokenizer.load(data / file)
    again, settings = round_trip(ours, tmp_path)
    assert (settings["tokenizer.ggml.model"], settings["tokenizer.ggml.pre"]) == (kind, pre)
    assert (again.special, again.eos_ids, again.bos_id) == (ours.special, ours.eos_ids, ours.bos_id)
    assert (again.chat_template, again.tool_template) == (ours.chat_template, ours.tool_template)
    prose = (data / "text/alice.txt").read_text("utf-8")[:100_000]
    for text in [*TEXTS, prose]:
        ids = ours.encode(text)
        assert again.encode(text) == ids
        assert again.decode(ids) == ours.decode(ids)
        assert again.encode(text, special=True) == ours.encode(text, special=True)
    if find_spec("llama_cpp"):
        found = llama_cpp_model(tmp_path / "m.gguf", vocab_only=True)
        for text in [*TEXTS[:-2], prose]:
            assert found.tokenize(text.encode(), add_bos=False, special=False) == ours.encode(text, bos=False)
        assert found.tokenize(b"a", special=False) == ours.encode("a")


def test_trained_tokenizers_give_the_same_ids(tmp_path: Path) -> None:
    made = [
        sentencepiece_tokenizer(),
        train_bpe(["the cat sat on the mat. " * 20, "def f(x):\n    return x\n" * 9], 300),
        byte_level(),
    ]
    for ours in made:
        again, _ = round_trip(ours, tmp_path, rows=320)
        assert again.vocab_size == ours.vocab_size
        assert (again.special, again.eos_ids, again.bos_id) == (ours.special, ours.eos_ids, ours.bos_id)
        assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def test_chat_templates_and_several_eos_ids(tmp_path: Path) -> None:
    config = {"bos_token": "<|a|>", "eos_token": "<|b|>", "add_bos_token": True}
    backend = train_bpe(["the cat sat on the mat. " * 9], 290, special=("<|a|>", "<|b|>", "<|c|>")).backend
    ours = Tokenizer(backend, config, "{{ messages[0].content }}<|c|>", "{{ tools }}", eos_ids=(2,))
    again, settings = round_trip(ours, tmp_path)
    assert (again.chat_template, again.tool_template) == ("{{ messages[0].content }}<|c|>", "{{ tools }}")
    assert (again.eos_ids, again.bos_id) == ((1, 2), 0)
    assert settings["tokenizer.ggml.eot_token_id"] == 2
    assert oneblock.load(tmp_path / "m.gguf").eos_ids == {1, 2}


def test_tokenizers_that_gguf_cannot_express(tmp_path: Path) -> None:
    with pytest.raises(OneblockError, match="cannot express this kind of tokenizer; export with --no-tokenizer"):
        round_trip(characters("abc"), tmp_path)
    with pytest.raises(OneblockError, match="has 300 ids, more than the embedding's 20"):
        round_trip(train_bpe(["the cat " * 50, "def f(x): return x" * 9, *TEXTS], 300), tmp_path, rows=20)


# ------------------------------------------------------------------ a trained model


@pytest.fixture(scope="module")
def stories(data: Path) -> tuple[LLM, dict[str, Any]]:
    folder = data / "weights/stories260k"
    return oneblock.load(folder), json.loads((folder / "expected.json").read_text("utf-8"))


@pytest.mark.parametrize(("type", "least"), [("f32", 200), ("f16", 200), ("q8_0", 100)])
def test_a_trained_llama_generates_the_same(
    type: str, least: int, stories: tuple[LLM, dict[str, Any]], tmp_path: Path
) -> None:
    llm, expected = stories
    save_gguf(tmp_path / "stories.gguf", llm.model, llm.tokenizer, type)
    again = oneblock.load(tmp_path / "stories.gguf", dtype="float32")
    assert again.spec == llm.spec
    assert again.encode("Once upon a time") == llm.encode("Once upon a time")
    found = again.generate("", max_tokens=200, temperature=0, ignore_eos=True)
    assert found.ids[:least] == expected["greedy_ids"][:least]
    assert least < 200 or found.text == expected["greedy_text"]


def test_the_export_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = str(data / "weights/stories260k"), tmp_path / "new" / "stories.gguf"
    assert main(["export", folder, str(out), "--type", "q8_0"]) == 0
    assert "stories.gguf: 345 kB" in capsys.readouterr().out
    assert main(["export", str(out), str(tmp_path / "again.gguf"), "--type", "f16", "--no-tokenizer"]) == 0
    assert load_gguf(tmp_path / "again.gguf")[1] is None
    assert main(["generate", str(out), "--prompt", "Once", "--max-tokens", "5"]) == 0
    capsys.readouterr()
    assert main(["export", folder, str(tmp_path)]) == 1
    assert "is a folder; name the file" in capsys.readouterr().err
    before = out.read_bytes()
    (tmp_path / "link.gguf").symlink_to(out)
    for source, target, problem in (
        (out, tmp_path / "link.gguf", "is the input, which would be overwritten"),
        (folder, tmp_path / "model.safetensors", "end it in .gguf"),
    ):
        assert main(["export", str(source), str(target)]) == 1
        assert problem in capsys.readouterr().err
    assert out.read_bytes() == before


# ------------------------------------------------------------------ llama.cpp itself


def test_llama_cpp_generates_the_same(stories: tuple[LLM, dict[str, Any]], tmp_path: Path) -> None:
    llm, expected = stories
    save_gguf(tmp_path / "stories.gguf", llm.model, llm.tokenizer, "f32")
    found = llama_cpp_model(tmp_path / "stories.gguf", n_ctx=512)
    assert found.tokenize(b"Once upon a time") == llm.encode("Once upon a time")
    ids = []
    for id in found.generate(expected["prompt_ids"], temp=0.0, repeat_penalty=1.0):
        ids.append(id)
        if len(ids) == 200:
            break
    assert ids == expected["greedy_ids"]


@pytest.mark.parametrize("name", SPECS)
def test_llama_cpp_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    """Up to rounding: llama.cpp has a 16-bit table of GELU. It ignores sliding windows except Gemma's."""
    tokenizer = train_bpe(["the cat sat on the mat. " * 20], 290)
    found = llama_cpp_model(
        written(tmp_path, name, "f32", tokenizer), n_ctx=256, n_batch=256, type_k=0, type_v=0, logits_all=True
    )
    ids = [i * 37 % 290 for i in range(9 if SPECS[name].layers[0].attn.window and "gemma" not in name else 60)]
    found.eval(ids)
    theirs = torch.tensor(np.array(found.scores[: len(ids)]))
    with torch.no_grad():
        ours = random_model(SPECS[name])(torch.tensor([ids]))[0]
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    assert (ours - theirs).abs().max() < ours.abs().max() * (1e-2 if "gemma" in name or "gpt2" in name else 2e-4)


@pytest.mark.parametrize(("type", "number"), [("Q4_K", 15), ("Q5_K", 17), ("Q6_K", 18), ("Q2_K", 10)])
def test_files_that_llama_cpp_quantized(type: str, number: int, tmp_path: Path) -> None:
    """Logits of the same quantized file agree better than quantized and original ones; llama.cpp rounds activations."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = random_model(FAMILIES["llama"](**(TINY | {"dim": 256, "hidden_dim": 512})))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(p.shape[-1] ** -0.5 if p.dim() == 2 else 1.0)
    tokenizer = train_bpe(["the cat sat on the mat. " * 20], 290)
    save_gguf(tmp_path / "plain.gguf", model, tokenizer, "f32")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = number, 1
    names = [str(tmp_path / name).encode() for name in ("plain.gguf", "small.gguf")]
    assert llama_cpp.llama_model_quantize(*names, ctypes.byref(options)) == 0
    kinds = [entry.dtype for entry in read_header(tmp_path / "small.gguf").tensors.values()]
    assert kinds.count(type) > 10
    ids = [i * 37 % 290 for i in range(40)]
    found = llama_cpp_model(tmp_path / "small.gguf", n_ctx=256, type_k=0, type_v=0, logits_all=True)
    found.eval(ids)
    theirs = torch.tensor(np.array(found.scores[: len(ids)]))
    with torch.no_grad():
        ours = load_gguf(tmp_path / "small.gguf", dtype="float32")[0].model(torch.tensor([ids]))[0]
        before = model(torch.tensor([ids]))[0]
    assert (ours - theirs).abs().mean() < 0.6 * (ours - before).abs().mean()
    assert (ours - theirs).abs().max() < 0.1 * ours.abs().max()


# ------------------------------------------------------------------ damaged files


def sentencepiece_tokenizer() -> Tokenizer:
    """A small SentencePiece tokenizer."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "b", "ab", "\u2581ab"]
    merges = [("a", "b"), ("\u2581", "ab")]
    model = models.BPE(
        {n: i for i, n in enumerate(names)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(names[:3])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file: fp32 and block-quantized tensors, arrays, strings, a BPE tokenizer."""
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = train_bpe(["the cat sat on the mat. " * 9], 270, special=("<|a|>", "<|b|>"))
    spec = FAMILIES["llama"](vocab=270, dim=32, n_heads=2, n_layers=1, hidden_dim=32, context=16, rope=LLAMA3)
    save_gguf(folder / "m.gguf", random_model(spec), tokenizer, "q8_0")
    return (folder / "m.gguf").read_bytes()


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file: sliding windows, soft caps, a SentencePiece tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    spec = FAMILIES["gemma2"](vocab=270, dim=32, n_heads=2, n_layers=2, hidden_dim=32, head_dim=16, query_scalar=16)
    save_gguf(folder / "m.gguf", random_model(spec), sentencepiece_tokenizer(), "bf16")
    return (folder / "m.gguf").read_bytes()


@pytest.fixture(scope="module")
def moe_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file: experts, no tokenizer."""
    folder = tmp_path_factory.mktemp("mixed")
    sizes = {"vocab": 64, "dim": 32, "n_heads": 2, "n_layers": 2, "head_dim": 16}
    spec = FAMILIES["qwen3_moe"](**sizes, expert_hidden_dim=32, n_experts=3, top_k=2, renormalize=True)
    save_gguf(folder / "m.gguf", random_model(spec), None, "q4_0")
    return (folder / "m.gguf").read_bytes()


def refusal(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(OneblockError) as error:
        load_gguf(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def change_after(bpe_file: bytes, key: str, change: Callable[[bytes], bytes]) -> bytes:
    """The file with the bytes after a key changed."""
    at = bpe_file.index(key.encode()) + len(key)
    return bpe_file[:at] + change(bpe_file[at:])


@pytest.mark.parametrize("count", [0, 3, 4, 8, 23, 24, 200, 5000, -1, -40])
def test_truncated_files(count: int, bpe_file: bytes, tmp_path: Path) -> None:
    assert "download it again" in refusal(tmp_path / "m.gguf", bpe_file[:count])


BAD: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "is not a GGUF file": ("", lambda b: b"GGML" + b[4:]),
    "is GGUF version 1": ("", lambda b: b[:4] + struct.pack("<I", 1) + b[8:]),
    "is big-endian": ("", lambda b: b[:4] + struct.pack(">I", 3) + b[8:]),
    "announces 1099511627776 tensors": ("", lambda b: b[:8] + struct.pack("<Q", 1 << 40) + b[16:]),
    "announces 18446744073709551615 metadata keys": ("", lambda b: b[:16] + b"\xff" * 8 + b[24:]),
    "bytes of text": ("general.architecture", lambda b: b[:4] + struct.pack("<Q", 1 << 50) + b[12:]),
    "strings, more than it can hold": ("ggml.tokens", lambda b: b[:8] + struct.pack("<Q", 1 << 50) + b[16:]),
    "unknown kind 77": ("llama.block_count", lambda b: struct.pack("<I", 77) + b[4:]),
    "architecture 'llaxx' is not supported; supported are gemma": (
        "general.architecture",
        lambda b: b.replace(b"llama", b"llaxx", 1),
    ),
    "'tokenizer.ggml.add_bos_token' occurs twice": ("", lambda b: b.replace(b"add_eos_token", b"add_bos_token", 1)),
    "unknown type 99": ("output_norm.weight", lambda b: b[:12] + struct.pack("<I", 99) + b[16:]),
    "is I32, which is not supported": ("output_norm.weight", lambda b: b[:12] + struct.pack("<I", 26) + b[16:]),
    "has 9 dimensions": ("output_norm.weight", lambda b: struct.pack("<I", 9) + b[4:]),
    "has the shape": ("output_norm.weight", lambda b: b[:4] + struct.pack("<Q", 0) + b[12:]),
    "is at bytes": ("output_norm.weight", lambda b: b[:16] + struct.pack("<Q", 1 << 60) + b[24:]),
    "overlaps another": ("output_norm.weight", lambda b: b[:16] + struct.pack("<Q", 0) + b[24:]),
    "but the configuration requires": ("output_norm.weight", lambda b: b[:4] + struct.pack("<Q", 31) + b[12:]),
    "tensor 'output_norm.weight' is missing": ("output_norm", lambda b: b.replace(b"", b"", 0)),
    "announces 4000 layers": ("llama.block_count", lambda b: b[:4] + struct.pack("<I", 4000) + b[8:]),
    "block_count is 5000000, not a whole number": (
        "llama.block_count",
        lambda b: b[:4] + struct.pack("<I", 5_000_000) + b[8:],
    ),
    "pre-tokenizer 'dbrz' is not supported": ("ggml.pre", lambda b: b.replace(b"dbrx", b"dbrz", 1)),
    "tokenizer is of the kind 'bert'": ("ggml.model", lambda b: b.replace(b"gpt2", b"bert", 1)),
    "general.alignment is 33": (
        "",
        lambda b: b.replace(b"general.file_type\x04\0\0\0\7", b"general.alignment\x04\0\0\0!"),
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_headers_that_do_not_match_the_file(message: str, bpe_file: bytes, tmp_path: Path) -> None:
    key, change = BAD[message]
    data = change_after(bpe_file, key, change) if key else change(bpe_file)
    if "is missing" in message:
        data = bpe_file.replace(b"output_norm.weight", b"output_nork.weight")
    assert message in refusal(tmp_path / "m.gguf", data)


def write_metadata_file(path: Path, **more: Any) -> Path:
    """A file without tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in more.items():
        kind = {int: "add_uint32", str: "add_string", list: "add_array"}[type(value)]
        getattr(writer, kind)(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def test_errors_stay_short(tmp_path: Path) -> None:
    numbers, letters = list(range(5000)), "x" * 100_000
    for more in ({"llama__block_count": numbers}, {"general__architecture": letters}, {"llama__block_count": letters}):
        with pytest.raises(OneblockError) as error:
            load_gguf(write_metadata_file(tmp_path / "m.gguf", **more))
        assert len(str(error.value)) < 400
        assert "\n" not in str(error.value)
    with pytest.raises(OneblockError, match=r"llama\.expert_count is 8, but the tensors hold 0 experts"):
        load_gguf(write_metadata_file(tmp_path / "m.gguf", llama__expert_count=8))
    more = {"general__architecture": "gemma", "gemma__expert_count": 8}
    with pytest.raises(OneblockError, match="is a mixture of experts of architecture 'gemma'"):
        load_gguf(write_metadata_file(tmp_path / "m.gguf", **more))


def test_without_the_library() -> None:
    code = "import sys; sys.modules['gguf'] = None; import oneblock.store.gguf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "OneblockError: GGUF needs the package gguf" in done.stderr
    assert "-m pip install gguf" in done.stderr


def test_one_of_several_parts(tmp_path: Path) -> None:
    with pytest.raises(OneblockError, match="one of several parts"):
        load_gguf(write_metadata_file(tmp_path / "m.gguf", split__count=3))
    with pytest.raises(OneblockError, match="cannot be read"):
        load_gguf(tmp_path / "none.gguf")


def mutate(data: bytes, rng: random.Random, header: int) -> bytes:
    """One to four mutations, 90% in the header: bytes, 4- and 8-byte integers, ranges removed or repeated."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(found), header) if rng.random() < 0.9 else len(found))
        match rng.randrange(6):
            case 0:
                found[at] = rng.randrange(256)
            case 1:
                found[at] ^= 1 << rng.randrange(8)
            case 2:
                found[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)))
            case 3:
                found[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 7, 8, 9, 255, 2**16, 2**31, 2**32 - 1)))
            case 4:
                del found[at : at + rng.choice((1, 4, 8, 100))]
            case 5:
                found[at:at] = found[at : at + rng.choice((1, 4, 8, 100))]
        if not found:
            break
    return bytes(found[: rng.randrange(len(found))] if found and rng.random() < 0.05 else found)


def fuzz(bpe_file: bytes, path: Path, count: int, seed: int) -> tuple[int, int]:
    """The numbers of mutated files that loaded and that were refused; anything else fails."""
    rng, loaded = random.Random(seed), 0
    header = bpe_file.index(b"output_norm.weight") + 1000
    for i in range(count):
        path.write_bytes(mutate(bpe_file, rng, header))
        try:
            load_gguf(path)
            loaded += 1
        except OneblockError as error:
            assert "\n" not in str(error), (seed, i)
        except BaseException as error:
            raise AssertionError(f"change {i} of seed {seed}: {type(error).__name__} {error}") from error
    return loaded, count - loaded


def test_mutated_files_load_or_are_refused(
    bpe_file: bytes, sentencepiece_file: bytes, moe_file: bytes, tmp_path: Path
) -> None:
    count = int(os.environ.get("ONEBLOCK_FUZZ", "2400")) // 3
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed, data in enumerate((bpe_file, sentencepiece_file, moe_file)):
        loaded, refused = fuzz(data, tmp_path / "m.gguf", count, seed)
        assert min(loaded, refused) > count // 40
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_mutated_files(
    bpe_file: bytes, sentencepiece_file: bytes, moe_file: bytes, tmp_path: Path
) -> None:
    for seed in range(100, 110):
        fuzz((bpe_file, sentencepiece_file, moe_file)[seed % 3], tmp_path / "m.gguf", 10_000, seed)
