"""KV cache: cached == full, batched == unbatched, and no layer stores more than its window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from oneblock.infer.cache import KVCache
from oneblock.model import Decoder
from oneblock.spec import FAMILIES, Spec

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def random_model(spec: Spec, seed: int = 0) -> Decoder:
    """A model with every parameter random, also norm weights, gates and sinks, which begin at constants."""
    torch.manual_seed(seed)
    model = Decoder(spec)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 1.0 if name.startswith(("embed", "positions")) else 0.3
            p.copy_(torch.randn(p.shape) * scale + (1.0 if p.dim() == 1 and name.endswith("norm.weight") else 0.0))
    return model


def with_short_windows(spec: Spec, size: int = 6) -> Spec:
    """The spec with windows and chunks much shorter than the sequence."""
    pattern = []
    for layer in spec.pattern:
        attn = layer.attn
        window = size if attn.window is not None else None
        chunk = size if attn.chunk is not None else None
        pattern.append(replace(layer, attn=replace(attn, window=window, chunk=chunk)))
    return replace(spec, pattern=tuple(pattern))


SPECS = {name: with_short_windows(build()) for name, build in FAMILIES.items()}
KINDS = {  # what no family has by default
    "window": {"window": 5},
    "chunk": {"chunk": 5},
    "window of one": {"window": 1},
    "chunk of one": {"chunk": 1},
}
for kind, change in KINDS.items():
    base = FAMILIES["llama"]()
    layers = (replace(base.pattern[0], attn=replace(base.pattern[0].attn, **change)), *base.pattern)
    SPECS[kind] = replace(base, pattern=layers, n_layers=3)


def logits_in_passes(
    model: Decoder, ids: torch.Tensor, pieces: list[int], capacity: int, quantized: bool = False
) -> tuple[torch.Tensor, KVCache]:
    cache = KVCache(model.spec, ids.shape[0], capacity, torch.float32, CPU, quantized)
    logits, start = [], 0
    for n in pieces:
        logits.append(model(ids[:, start : start + n], cache=cache))
        start += n
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("pieces", [[29] + [1] * 3, [1] * 32, [3, 1, 9, 1, 1, 17], [4, 8, 20]], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_cached_equals_full(name, pieces):
    model = random_model(SPECS[name])
    ids = torch.randint(0, model.spec.vocab, (2, 32), generator=torch.Generator().manual_seed(1))
    full = model(ids)
    cached, cache = logits_in_passes(model, ids, pieces, capacity=32)
    torch.testing.assert_close(cached, full, atol=1e-4, rtol=1e-4)
    assert cache.length == 32
    assert not cache.padded


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "left-padded"])
@pytest.mark.parametrize("name", SPECS)
def test_logits_to_keep_returns_the_last_columns(name: str, padded: bool) -> None:
    """The last layer computes only their queries, and stores the keys and values of all columns."""
    model = random_model(SPECS[name])
    ids = torch.randint(0, model.spec.vocab, (2, 32), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(32) - torch.tensor([[0], [3 if padded else 0]])
    mlp_columns = []
    model.blocks[-1].mlp.register_forward_pre_hook(lambda _, args: mlp_columns.append(args[0].shape[1]))
    cache, other = (KVCache(model.spec, 2, 32, torch.float32, CPU) for _ in range(2))
    for start, end, last in ((0, 13, 1), (13, 20, 3), (20, 21, 1), (21, 32, 11)):
        part, at = ids[:, start:end], positions[:, start:end] if padded else None
        kept = model.hidden_states(part, positions=at, cache=cache, logits_to_keep=last)
        assert mlp_columns.pop() == last
        full = model.hidden_states(part, positions=at, cache=other)
        torch.testing.assert_close(kept, full[:, -last:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.hidden_states(ids, logits_to_keep=2), model.hidden_states(ids)[:, -2:])


@pytest.mark.parametrize("name", SPECS)
def test_int8_cache_is_close_to_full(name: str) -> None:
    """In one pass, in several, and after growth; it takes less than half of the memory."""
    model = random_model(SPECS[name])
    ids = torch.randint(0, model.spec.vocab, (2, 32), generator=torch.Generator().manual_seed(1))
    full = model(ids)
    one_pass, cache = logits_in_passes(model, ids, [32], 32, quantized=True)
    several, grown = logits_in_passes(model, ids, [3, 1, 9, 1, 1, 17], 4, quantized=True)
    assert 0 < (one_pass - full).norm() / full.norm() < 0.1
    assert (several - one_pass).norm() / full.norm() < 0.02
    unquantized = logits_in_passes(model, ids, [32], 32)[1].nbytes
    assert cache.nbytes < 0.5 * unquantized
    can_rewind = grown.rewind(20)
    assert can_rewind == all(n >= 32 for kind in model.spec.pattern for n in (kind.attn.window, kind.attn.chunk) if n)


@pytest.mark.parametrize("name", SPECS)
def test_batched_equals_unbatched(name):
    model = random_model(SPECS[name])
    lengths, longest, more = [3, 14, 9, 1], 14, 12
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, model.spec.vocab, (n + more,), generator=generator) for n in lengths]
    columns = torch.arange(longest + more)
    pads = torch.tensor([longest - n for n in lengths])
    ids = torch.stack([torch.nn.functional.pad(t, (longest + more - len(t), 0)) for t in prompts])
    positions = columns - pads[:, None]
    cache = KVCache(model.spec, 4, longest + more, torch.float32, CPU)
    logits = [model(ids[:, :longest], positions=positions[:, :longest], cache=cache)]
    for c in range(longest, longest + more):
        explicit = positions[:, c : c + 1]
        logits.append(model(ids[:, c : c + 1], positions=explicit, cache=cache))
    assert cache.padded
    batched = torch.cat(logits, 1)
    for row, text in enumerate(prompts):
        unbatched = model(text[None])[0]
        torch.testing.assert_close(batched[row, pads[row] :], unbatched, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n, s in SPECS.items() if any(x.attn.window or x.attn.chunk for x in s.layers)])
def test_a_layer_never_stores_more_than_its_window(name):
    model = random_model(SPECS[name])
    ids = torch.randint(0, model.spec.vocab, (2, 40))
    _, cache = logits_in_passes(model, ids, [20] + [1] * 20, capacity=64)
    expected = 0
    for layer, kept in enumerate(model.spec.layers):
        a = kept.attn
        size = min(64, a.window or 64, a.chunk or 64)
        assert cache.size(layer) == size
        expected += 0 if a.cross else 2 * 2 * a.n_kv_heads * size * a.head_dim * 4
    assert cache.nbytes == expected


@pytest.mark.parametrize("name", SPECS)
def test_grows_past_its_capacity(name):
    model = random_model(SPECS[name])
    ids = torch.randint(0, model.spec.vocab, (1, 30))
    grown, cache = logits_in_passes(model, ids, [3, 1, 1, 1, 10] + [1] * 14, capacity=4)
    torch.testing.assert_close(grown, model(ids), atol=1e-4, rtol=1e-4)
    assert cache.capacity >= 30


def test_no_memory_is_allocated_before_the_first_token():
    spec = FAMILIES["llama"]()
    cache = KVCache(spec, 1, 1_000_000_000, torch.float32, CPU)
    assert cache.nbytes == 0


def test_unwritten_memory_is_never_read():
    """Unwritten columns hold arbitrary values, NaN here."""
    model = random_model(SPECS["gemma3"])
    ids = torch.randint(0, model.spec.vocab, (1, 12))
    cache = KVCache(model.spec, 1, 64, torch.float32, CPU)
    model(ids[:, :4], cache=cache)
    for stored in (*cache._keys, *cache._values):
        assert stored is not None
        [x] = stored
        x[:, :, min(4, x.shape[2]) :] = float("nan")
    logits = [model(ids[:, i : i + 1], cache=cache) for i in range(4, 12)]
    torch.testing.assert_close(torch.cat(logits, 1), model(ids)[:, 4:], atol=1e-4, rtol=1e-4)


def test_another_continuation_after_a_rewind():
    model = random_model(SPECS["llama"])
    ids, other = torch.randint(0, 64, (1, 20)), torch.randint(0, 64, (1, 20))
    _, cache = logits_in_passes(model, ids, [12, 1, 1, 1, 5], capacity=32)
    assert cache.rewind(7)
    assert cache.length == 7
    mixed = torch.cat((ids[:, :7], other[:, 7:]), 1)
    torch.testing.assert_close(model(mixed[:, 7:], cache=cache), model(mixed)[:, 7:], atol=1e-4, rtol=1e-4)


def test_rewind_fails_once_a_ring_has_overwritten_a_column():
    model = random_model(SPECS["gemma2"])
    window = min(a.attn.window for a in model.spec.layers if a.attn.window)
    ids = torch.randint(0, model.spec.vocab, (1, window + 1))
    _, cache = logits_in_passes(model, ids[:, :window], [window], capacity=32)
    assert cache.rewind(window - 2)
    model(ids[:, window - 2 :], cache=cache)
    assert not cache.rewind(window)
    assert cache.length == window + 1
    assert cache.rewind(window + 1), "no column to drop"
    assert not cache.rewind(window + 2), "cannot go forward"


def test_select_rows():
    model = random_model(SPECS["mistral"])
    ids = torch.randint(0, model.spec.vocab, (3, 16))
    _, cache = logits_in_passes(model, ids[:, :14], [12, 1, 1], capacity=20)
    cache.select_rows([2, 0])
    logits = [model(ids[[2, 0], i : i + 1], cache=cache) for i in (14, 15)]
    torch.testing.assert_close(torch.cat(logits, 1), model(ids)[[2, 0], 14:], atol=1e-4, rtol=1e-4)


def test_positions_that_do_not_start_at_zero_are_stored():
    """Column 0 holds position 7: the next pass must not read positions from columns."""
    model = random_model(SPECS["llama"])
    ids = torch.randint(0, model.spec.vocab, (1, 6))
    cache = KVCache(model.spec, 1, 8, torch.float32, CPU)
    parts = [model(ids[:, i : i + 1], positions=torch.tensor([[7 + i]]), cache=cache) for i in range(6)]
    assert cache.padded
    shifted = model(ids, positions=torch.arange(7, 13)[None])
    torch.testing.assert_close(torch.cat(parts, 1), shifted, atol=1e-4, rtol=1e-4)


class TestImages:
    """Keys and values of image features are projected once per image, not once per decoded token."""

    @pytest.mark.parametrize("quantized", [False, True])
    @pytest.mark.parametrize("pass_image", ["always", "first"])
    def test_one_projection_per_image(self, pass_image: str, quantized: bool) -> None:
        model, ids, image = self.model_and_inputs()
        projections = self.count_projections(model)
        cache = KVCache(model.spec, 2, 24, torch.float32, CPU, quantized)
        logits = [model(ids[:, :16], image=image, cache=cache)]
        for i in range(16, 24):
            logits.append(model(ids[:, i : i + 1], image=image if pass_image == "always" else None, cache=cache))
        n_cross = sum(layer.attn.cross for layer in model.spec.layers)
        assert projections == {"wk": n_cross, "wv": n_cross}
        full = model(ids, image=image)
        if quantized:
            assert (torch.cat(logits, 1) - full).norm() / full.norm() < 0.1
        else:
            torch.testing.assert_close(torch.cat(logits, 1), full, atol=1e-4, rtol=1e-4)

    def test_another_image_replaces_the_first(self) -> None:
        model, ids, image = self.model_and_inputs()
        other = image.flip(2)
        cache = KVCache(model.spec, 2, 24, torch.float32, CPU)
        model(ids[:, :16], image=image, cache=cache)
        cache.rewind(0)
        actual = model(ids[:, :16], image=other, cache=cache)
        torch.testing.assert_close(actual, model(ids[:, :16], image=other), atol=1e-4, rtol=1e-4)
        cache.rewind(0)
        torch.testing.assert_close(model(ids, cache=cache), model(ids), atol=1e-4, rtol=1e-4)

    def test_selected_rows_keep_their_images(self) -> None:
        model, ids, image = self.model_and_inputs()
        cache = KVCache(model.spec, 2, 24, torch.float32, CPU)
        model(ids[:, :16], image=image, cache=cache)
        cache.select_rows([1])
        actual = model(ids[1:, 16:], cache=cache)
        torch.testing.assert_close(actual, model(ids, image=image)[1:, 16:], atol=1e-4, rtol=1e-4)

    def model_and_inputs(self) -> tuple[Decoder, torch.Tensor, torch.Tensor]:
        [name] = [name for name, spec in SPECS.items() if any(layer.attn.cross for layer in spec.layers)]
        model = random_model(SPECS[name])
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(0, model.spec.vocab, (2, 24), generator=generator)
        return model, ids, torch.randn(2, 5, model.spec.dim, generator=generator)

    def count_projections(self, model: Decoder) -> dict[str, int]:
        counts = {"wk": 0, "wv": 0}

        def count(name: str) -> None:
            counts[name] += 1

        for layer, block in zip(model.spec.layers, model.blocks, strict=True):
            for name in counts if layer.attn.cross else ():
                getattr(block.attn, name).register_forward_hook(lambda *_, name=name: count(name))
        return counts
