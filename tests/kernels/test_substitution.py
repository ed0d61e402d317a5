"""Adapters, hooks and other changes of optimized, quantized and compiled models take effect; models are freed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oneblock.errors import OneblockError
from oneblock.infer.cache import KVCache
from oneblock.infer.extend_context import extend_context
from oneblock.infer.llm import LLM
from oneblock.infer.prepare import prepare_for_inference
from oneblock.kernels import build
from oneblock.kernels.build import has_compiler
from oneblock.kernels.compiled_step import CompiledStep
from oneblock.kernels.cpu_modules import FusedBlock, optimize_for_cpu
from oneblock.kernels.linear import SkinnyGemmLinear, can_fuse, slice_linear
from oneblock.kernels.substitution import Structure, replace_module
from oneblock.model import Decoder, init_weights
from oneblock.quant.quantize import QuantConfig, quantize
from oneblock.spec import get_spec

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
needs_kernels = pytest.mark.skipif(not build.is_available(), reason=build.unavailable_reason() or "available")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
FORMATS = {"bf16": None, "int8": QuantConfig(8), "int4": QuantConfig(4, 32), "fp8": QuantConfig(8, fp8=True)}
LINEARS = ("wq", "wk", "wv", "wo", "gate", "up", "down")


class LoRA(nn.Module):
    """A user's wrapper: nothing but `forward` around a linear layer of any kind."""

    def __init__(self, base: nn.Module, n_in: int, n_out: int):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(4, n_in).bfloat16() / n_in**0.5)
        self.b = nn.Parameter(torch.randn(n_out, 4).bfloat16() / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def small(family: str = "llama", **sizes: int) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(get_spec(family, **{"vocab": 64, "dim": 64, "n_layers": 2, "n_heads": 2, "context": 64, **sizes}))
    init_weights(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    return model.bfloat16().eval()


def wrap(model: Decoder, names: tuple[str, ...] = LINEARS) -> None:
    """Wrap these linear layers of every block, with the same adapter weights each time."""
    torch.manual_seed(1)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in names:
            linear: Any = module
            replace_module(model, name, LoRA(linear, linear.in_features, linear.out_features))


@torch.inference_mode()
def prefill_and_decode(model: Decoder, step: CompiledStep | None = None) -> Tensor:
    """Logits (1, 4, V) of a prompt's last token and of three decoded ones."""
    ids = torch.tensor([[3, 14, 15, 9, 2, 6, 5]])
    cache = KVCache(model.spec, 1, 16, model.dtype)
    logits = [model(ids[:, :4], cache=cache)[:, -1]]
    for i in (4, 5, 6):
        token = ids[:, i : i + 1]
        logits.append(model(token, cache=cache)[:, -1] if step is None else step(token, None, cache))
    return torch.stack(logits, 1).float()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


# ------------------------------------------------------------------ adapters


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("names", [LINEARS, ("wq",), ("wo",), ("down",), ("gate",)], ids="-".join)
def test_adapters_on_optimized_models(weights: str, names: tuple[str, ...]) -> None:
    """A wrapped layer is called, never bypassed by a fused kernel, and its neighbours stay right."""
    model, config = small(), FORMATS[weights]
    if config:
        quantize(model, config)
    plain = copy.deepcopy(model)
    optimize_for_cpu(model)
    before = prefill_and_decode(model)
    wrap(model, names)
    wrap(plain, names)
    expected = prefill_and_decode(plain.float())
    assert relative_error(prefill_and_decode(model), expected) < 0.08
    assert relative_error(before, expected) > 0.2, "the adapter's effect is too small for this test"


def test_an_adapter_that_passes_attributes_through_is_called() -> None:
    class Transparent(LoRA):
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("base"), name)

    layers = [SkinnyGemmLinear(64, 64).bfloat16() for _ in range(2)]
    assert can_fuse(*layers)
    wrapped = Transparent(layers[0], 64, 64)
    assert wrapped.kernel_weight() is not None
    assert not can_fuse(layers[1], wrapped)
    assert not can_fuse(wrapped, layers[1])


def test_layers_that_are_subclassed_hooked_or_of_other_dtypes_are_not_fused() -> None:
    class Scaled(SkinnyGemmLinear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    def layer(kind: type[SkinnyGemmLinear] = SkinnyGemmLinear, bias: bool = True) -> SkinnyGemmLinear:
        return kind(64, 64, bias=bias).bfloat16()

    assert not can_fuse(layer(), layer(Scaled))
    assert not can_fuse(layer(Scaled), layer(Scaled))
    assert not can_fuse(layer(), layer(bias=False))
    assert not can_fuse(layer(), layer().float())
    assert not can_fuse(layer(), nn.Linear(64, 64).bfloat16())
    parametrized = layer()
    torch.nn.utils.parametrizations.weight_norm(parametrized)
    assert not can_fuse(layer(), parametrized)
    hooked = layer()
    handle = hooked.register_forward_hook(lambda m, args, y: y)
    assert not can_fuse(layer(), hooked)
    handle.remove()
    assert can_fuse(layer(), hooked)


@pytest.mark.parametrize("part", ["attn.wq", "attn.wo", "mlp.up", "mlp.down", "mlp", "mlp_in", "attn"])
def test_hooks_see_every_decode_step(part: str) -> None:
    model, calls = small(), []
    optimize_for_cpu(model)
    handle = model.blocks[1].get_submodule(part).register_forward_hook(lambda m, args, y: calls.append(m))
    prefill_and_decode(model)
    assert len(calls) == 4
    handle.remove()


def test_an_adapter_cannot_be_sliced() -> None:
    layer = nn.Linear(64, 32)
    torch.testing.assert_close(slice_linear(layer, 0, slice(8, 16)).weight, layer.weight[8:16], rtol=0, atol=0)
    assert slice_linear(layer, 1, slice(0, 32)).in_features == 32
    with pytest.raises(OneblockError, match="a LoRA cannot be sliced"):
        slice_linear(LoRA(layer, 64, 32), 0, slice(0, 8))


# ------------------------------------------------------------------ the order of transformations


@needs_kernels
def test_prepare_for_inference_is_idempotent_and_keeps_names() -> None:
    model = small()
    names = [name for name, _ in model.named_parameters()]
    prepare_for_inference(model)
    modules = [id(m) for m in model.modules()]
    prepare_for_inference(model)
    assert [id(m) for m in model.modules()] == modules
    assert [name for name, _ in model.named_parameters()] == names
    assert isinstance(model.blocks[0], FusedBlock)
    patched = {key for m in model.modules() for key, value in vars(m).items() if callable(value)}
    assert patched <= {"attention_backend"}, "an instance has a replaced method"


@needs_kernels
@pytest.mark.parametrize("weights", FORMATS)
def test_an_optimized_model_uses_the_fused_kernels(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per layer of a decode step: one GEMM for q, k and v, one attention, one kernel for everything after it."""
    model = prepare_for_inference(small(), quant=FORMATS[weights])
    cache = KVCache(model.spec, 1, 16, model.dtype)
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]]), cache=cache)
        with torch.profiler.profile(acc_events=True) as profile:
            model(torch.tensor([[4]]), cache=cache)
    counts = {e.key.removeprefix("oneblock_cpu::"): e.count for e in profile.key_averages() if "oneblock_cpu" in e.key}
    layers = model.spec.n_layers
    if weights == "fp8":
        assert counts == {"decode_attention": layers, "norm": 2 * layers + 1, "apply_rope": 2 * layers,
                          "gated_activation": layers}  # fmt: skip
    else:
        assert counts == {"linear": layers + 1, "decode_attention": layers, "fused_post_attention": layers,
                          "norm": layers + 1, "apply_rope": 2 * layers}  # fmt: skip


# ------------------------------------------------------------------ lifetime


def optimized(model: Decoder) -> Decoder:
    optimize_for_cpu(model)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("weights", FORMATS)
def test_a_model_is_freed_with_its_last_reference(family: str, weights: str) -> None:
    """Without the garbage collector: no reference cycles."""
    model = prepare_for_inference(small(family), quant=FORMATS[weights])
    llm = LLM(model)
    llm.generate([1, 2, 3], max_tokens=4, ignore_eos=True)
    refs = [weakref.ref(x) for x in (*model.modules(), *model.parameters(), *model.buffers())]
    gc.collect()
    gc.disable()
    try:
        del model, llm
        assert sum(ref() is not None for ref in refs) == 0
    finally:
        gc.enable()


@needs_compiler
def test_a_compiled_model_is_freed() -> None:
    model = optimized(small())
    step = CompiledStep(model)
    prefill_and_decode(model, step)
    refs = [weakref.ref(x) for x in (*model.modules(), *model.parameters())]
    del model, step
    gc.collect()
    assert sum(ref() is not None for ref in refs) == 0


@needs_kernels
def test_an_optimized_model_can_be_copied_and_pickled() -> None:
    model = prepare_for_inference(small("mixtral"), quant=QuantConfig(8))
    expected = prefill_and_decode(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(prefill_and_decode(other), expected)


# ------------------------------------------------------------------ stale graphs


def scale_rope(model: Decoder) -> None:
    extend_context(model, 128, "linear")


def quantize_weights(model: Decoder) -> None:
    quantize(model, QuantConfig(8))


def replace_norm(model: Decoder) -> None:
    model.blocks[0].attn_in = nn.Identity()


CHANGES: dict[str, Callable[[Decoder], None]] = {
    "adapters": wrap,
    "rope": scale_rope,
    "quantization": quantize_weights,
    "module": replace_norm,
    "dtype": lambda model: model.float() and None,
}


@needs_compiler
def test_changes_invalidate_the_compiled_step() -> None:
    """One after another, each on top of those before it."""
    model = optimized(small(n_layers=1))
    step = CompiledStep(model)
    before = prefill_and_decode(model, step)
    assert relative_error(before, prefill_and_decode(model)) < 0.03
    for name, change in CHANGES.items():
        change(model)
        expected = prefill_and_decode(model)
        after = prefill_and_decode(model, step)
        assert relative_error(after, expected) < 0.05, name
        if name not in ("quantization", "dtype"):  # these change the logits by a rounding
            assert relative_error(before, expected) > 0.1, f"{name}: the effect is too small for this test"
        before = after


@needs_compiler
def test_a_quantized_moe_model_compiles() -> None:
    model = prepare_for_inference(small("mixtral", n_layers=1), quant=QuantConfig(4, 32))
    assert relative_error(prefill_and_decode(model, CompiledStep(model)), prefill_and_decode(model)) < 0.08


def test_structure_notices_changes_and_only_those() -> None:
    model = small()
    structure = Structure(model)
    prefill_and_decode(model)
    assert structure.is_current()
    handle = model.blocks[0].register_forward_hook(lambda m, args, y: None)
    assert not structure.is_current()
    handle.remove()
    assert structure.is_current()
    wq = model.blocks[1].attn.wq
    model.blocks[1].attn.wq = LoRA(wq, 64, 64)  # type: ignore[assignment]
    assert not structure.is_current()
    model.blocks[1].attn.wq = wq
    assert structure.is_current()
    scale_rope(model)
    assert not structure.is_current()
