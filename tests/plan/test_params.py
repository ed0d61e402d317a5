"""Parameter counts: the published models to the last digit, small ones by hand, and all against the real modules."""

import pytest
import torch

from oneblock.model import Decoder
from oneblock.plan import params
from oneblock.spec import FAMILIES, MODELS, Spec, get_spec

# Total, or (total, active); tied heads once; of models that see images the text side. GPT-2 counts 124,439,808.
COUNTS: dict[str, int | tuple[int, int]] = {
    "gpt1": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3-small": 125_226_240,
    "gpt3-medium": 355_871_744,
    "gpt3-large": 760_300_032,
    "gpt3-xl": 1_315_723_264,
    "gpt3-2.7b": 2_651_553_280,
    "gpt3-6.7b": 6_658_404_352,
    "gpt3-13b": 12_952_938_780,
    "gpt3-175b": 174_604_259_328,
    "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "opt-175b": 174_604_468_224,
    "gpt-neox-20b": 20_554_567_680,
    "pythia-160m": 162_322_944,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "llama-3.2-11b-vision": 9_775_192_080,
    "llama-3.2-11b-vision-instruct": 9_775_192_080,
    "llama-3.2-90b-vision-instruct": 87_666_865_192,
    "llama-4-scout": (107_769_861_120, 17_172_894_720),
    "llama-4-maverick": (400_711_848_960, 17_184_691_200),
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248),
    "mixtral-8x22b": (140_630_071_296, 39_161_468_928),
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen1.5-moe-a2.7b": (14_315_784_192, 2_689_173_504),
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704),
    "qwen3-235b-a22b": (235_093_634_560, 22_190_763_520),
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
    "phi-1.5": 1_418_270_720,
    "phi-2": 2_779_683_840,
    "phi-3-mini-4k": 3_821_079_552,
    "phi-3-mini-128k": 3_821_079_552,
    "phi-3-medium-4k": 13_960_238_080,
    "phi-4": 14_659_507_200,
    "phi-4-mini": 3_836_021_760,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400,
    "olmo-2-32b": 32_234_279_936,
    "olmo-3-7b": 7_298_011_136,
    "olmo-3-32b": 32_233_522_176,
    "gpt-oss-20b": (20_914_757_184, 4_187_440_704),
    "gpt-oss-120b": (116_829_156_672, 5_711_982_912),
    "stablelm-3b": 2_795_443_200,
    "stablelm-2-1.6b": 1_644_515_328,
}


def test_no_model_is_forgotten():
    assert list(COUNTS) == list(MODELS)


@pytest.mark.parametrize("name", COUNTS)
def test_published_counts(name: str):
    expected = COUNTS[name]
    total, active = expected if isinstance(expected, tuple) else (expected, expected)
    assert params.total(get_spec(name)) == total
    assert params.total(get_spec(name), active=True) == active


def module_parts(built: Spec) -> dict[str, int]:
    """The same parts, counted on a module without memory."""
    with torch.device("meta"):
        model = Decoder(built)
    parts: dict[str, int] = {part: 0 for part in params.PARTS}
    kinds = [("experts" if hasattr(block.mlp, "router") else "mlp") for block in model.blocks]
    for name, parameter in model.named_parameters():
        parts[part_of(name, kinds)] += parameter.numel()
    return parts


def part_of(name: str, kinds: list[str]) -> str:
    words = name.split(".")
    if words[0] != "blocks":
        return {"embed": "embedding", "norm": "norms"}.get(words[0], words[0])
    if words[2] in ("attn", "mlp"):
        return "norms" if "norm" in words[3] else "attention" if words[2] == "attn" else kinds[int(words[1])]
    return "gates" if words[2].endswith("gate") else "norms"


@pytest.mark.parametrize("name", [*MODELS, *(f for f in FAMILIES if f not in MODELS)])
def test_every_part_is_what_the_module_has(name: str):
    assert params.by_part(get_spec(name)) == module_parts(get_spec(name))


def test_gpt2_by_hand():
    dim, layers = 768, 12
    assert params.by_part(get_spec("gpt2")) == {
        "embedding": 50257 * dim,
        "positions": 1024 * dim,
        "attention": layers * (4 * dim * dim + 4 * dim),
        "mlp": layers * (8 * dim * dim + 4 * dim + dim),
        "experts": 0,
        "norms": (2 * layers + 1) * 2 * dim,
        "gates": 0,
        "head": 0,
    }


def test_mixtral_by_hand():
    dim, hidden, layers = 4096, 14336, 32
    parts, active = params.by_part(get_spec("mixtral-8x7b")), params.by_part(get_spec("mixtral-8x7b"), active=True)
    assert parts["experts"] == layers * (8 * 3 * dim * hidden + 8 * dim)
    assert active["experts"] == layers * (2 * 3 * dim * hidden + 8 * dim)
    assert {k: v for k, v in parts.items() if k != "experts"} == {k: v for k, v in active.items() if k != "experts"}


def test_gpt_oss_experts_by_hand():
    dim, layers = 2880, 24
    expert = 3 * dim * dim + 3 * dim  # as wide as the stream, three biases
    assert params.by_part(get_spec("gpt-oss-20b"))["experts"] == layers * (32 * expert + 32 * dim + 32)
