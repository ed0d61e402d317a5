"""What a training run can be told; each field is a flag and a TOML key. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Sizes:
    """The model's sizes; what is not given stays as the model's name has it."""

    dim: int | None = None  # width of the stream
    n_layers: int | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None  # fewer than heads: grouped-query attention
    head_dim: int | None = None
    hidden: int | None = None  # width of the feed-forward


@dataclass(frozen=True)
class Dropouts:
    """Probabilities; the four others take `dropout` where they are not given."""

    dropout: float = 0.0
    embed_dropout: float | None = None
    attn_dropout: float | None = None
    residual_dropout: float | None = None
    mlp_dropout: float | None = None


@dataclass(frozen=True)
class Optimizer:
    """AdamW (arXiv:1711.05101). Norms, biases and embeddings are not decayed."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # largest norm of the gradient; 0: any


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a run, as shares of `lr`."""

    schedule: Literal["cosine", "flat"] = "cosine"  # flat: constant, then a straight line down
    warmup: int = 100  # steps
    decay: float = 0.3  # share of the run that the flat schedule goes down for
    final: float = 0.0  # share of lr at the end


@dataclass(frozen=True)
class Loop:
    steps: int = 1000
    seconds: float | None = None  # train for this long instead of for a number of steps
    batch: int = 16  # rows that go through the model at once
    accumulate: int = 1  # batches in one step of the optimizer
    seed: int = 0
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the products; auto: bfloat16 where the machine has it
    compile: bool = False  # torch.compile: half a minute first, then faster steps


@dataclass(frozen=True)
class Watch:
    """What is looked at and saved on the way; 0: never."""

    log_every: int = 10
    eval_every: int = 250
    eval_batches: int = 0  # batches of the validation text; 0: all of it
    sample_every: int = 0
    sample_tokens: int = 120
    prompt: str = "\n"
    save_every: int = 500
    keep: int = 2  # newest checkpoints that stay


@dataclass(frozen=True)
class Train:
    """Train a model on text files."""

    data: tuple[Path, ...] = ()  # text files to learn from
    val: tuple[Path, ...] = ()  # text files to validate on; without them: the end of the data
    val_share: float = 0.1  # of the data, kept for validation where --val is not given
    tokenizer: str = "chars"  # chars, bytes, bpe (with --vocab), or a folder with a tokenizer
    vocab: int = 4096  # tokens that bpe learns
    model: str = "llama"  # a family or model name (oneblock models), or a config.json
    context: int | None = None  # tokens in a row; without it: the model's, at most 1024
    sizes: Sizes = field(default_factory=Sizes)
    dropouts: Dropouts = field(default_factory=Dropouts)
    loop: Loop = field(default_factory=Loop)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    watch: Watch = field(default_factory=Watch)
    out: Path | None = None  # the run's folder; without it: runs/ and the next number
    resume: Path | None = None  # a run's folder, to go on from its last checkpoint
    config: Path | None = None  # a TOML file with any of these settings
    dry_run: bool = False  # say what it would need, and stop
