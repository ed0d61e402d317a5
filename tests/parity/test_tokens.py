"""Every class writes the reference's greedy tokens, in batches of prompts of different lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import oneblock

NEW = 16
LENGTHS = (38, 5, 21)  # the first crosses the LongRoPE limit of 40 while writing; all cross windows and chunks
TIE = 5e-6  # logits this close may come in either order: rounding decides


def reference_tokens(model: Any, prompt: list[int], cached: bool) -> tuple[list[int], list[float]]:
    """The reference's own generation, and each token's lead over the next likely one."""
    model.generation_config.eos_token_id = None
    kwargs = {"do_sample": False, "max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, use_cache=cached, **kwargs)
    return output.sequences[0, len(prompt) :].tolist(), [lead(logits) for logits in output.logits]


def recomputed_tokens(model: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    """GPT-1's `generate` gives other positions than its forward pass does: ask that, once for each token."""
    ids, leads = torch.tensor([prompt]), []
    for _ in range(NEW):
        logits: Tensor = model(ids).logits[:, -1]
        leads.append(lead(logits))
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    return ids[0, len(prompt) :].tolist(), leads


def lead(logits: Tensor) -> float:
    return logits.topk(2).values.diff().abs().item()


def decided(leads: list[float]) -> int:
    """How many tokens come before the first tie, which rounding decides."""
    return next((i for i, value in enumerate(leads) if value < TIE), len(leads))


@torch.no_grad()
def test_greedy_tokens_equal_the_reference(reference: Any) -> None:
    """The reference runs cached, but for LongRoPE: of its classes only Phi-3's then reads the text again."""
    llm = oneblock.load(reference.folder, dtype="float32")
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 101, (n,), generator=generator).tolist() for n in LENGTHS]
    options = {"max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    together, compared = llm.generate(prompts, **options), 0
    for prompt, row in zip(prompts, together, strict=True):
        if reference.case.config == "OpenAIGPT":
            ids, leads = recomputed_tokens(reference.model, prompt)
        else:
            ids, leads = reference_tokens(reference.model, prompt, reference.case.name != "llama-longrope")
        n = decided(leads)
        assert llm.generate(prompt, **options).ids[:n] == ids[:n]
        assert row.ids[:n] == ids[:n]
        compared += n
    assert compared >= len(prompts) * NEW // 2
