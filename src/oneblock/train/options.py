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
    hidden_dim: int | None = None  # width of the feed-forward


@dataclass(frozen=True)
class Start:
    """The weights that training begins with."""

    zero_out: bool = False  # what writes to the stream begins at zero, so that every block passes it on as it is
    embed_std: float | None = None  # spread of the embedding; without it: as all matrices


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
    """What moves the weights. Norms, biases and embeddings are not decayed unless asked."""

    # adamw (arXiv:1711.05101); muon (arXiv:2502.16982) for the blocks' matrices with AdamW for the rest;
    # adamw8bit (arXiv:2110.02861): moments in 8 bits, by torchao
    optimizer: Literal["adamw", "muon", "adamw8bit"] = "adamw"
    lr: float = 1e-3  # learning rate at its peak
    matrix_lr: float | None = None  # of Muon's matrices, on AdamW's scale; without it: lr
    beta1: float = 0.9
    beta2: float = 0.99
    momentum: float = 0.95  # Muon's
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_all: bool = False  # decay norms, biases and embeddings too
    clip: float = 1.0  # largest norm of the gradient; 0: any
    ema: float = 0.0  # decay of a running average of the weights, 0.999 or so; 0: none is kept


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a run, as shares of `lr`, and the size of a step."""

    schedule: Literal["cosine", "linear", "flat"] = "cosine"  # flat: constant, then a straight line down
    warmup: int = 100  # steps
    decay: float = 0.3  # share of the run that the flat schedule goes down for
    final: float = 0.0  # share of lr at the end
    ramp: int = 0  # steps over which a step grows from one batch to all of --accumulate


@dataclass(frozen=True)
class Objective:
    """What is added to the cross-entropy; 0: nothing."""

    z_loss: float = 0.0  # times the squared log of the softmax's sum: keeps logits near zero (arXiv:2204.02311)
    # Experts get equal shares of the tokens by a loss (arXiv:2101.03961), or by steering the router's bias, where the
    # model has one (arXiv:2408.15664)
    balance: Literal["loss", "bias", "none"] = "loss"
    balance_weight: float = 0.01  # of that loss; or the size of the bias's steps
    router_z_loss: float = 0.0  # the same as z_loss for the router's logits (arXiv:2202.08906)


@dataclass(frozen=True)
class Loop:
    steps: int = 1000
    seconds: float | None = None  # train for this long instead of for a number of steps
    batch: int = 16  # rows that go through the model at once, on all ranks together
    accumulate: int = 1  # batches in one step of the optimizer
    seed: int = 0
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the products; auto: bfloat16 where the machine has it
    fp8: bool = False  # products in 8-bit floats, by torchao: GPUs since Hopper
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: where it pays
    recompute: Literal["none", "selective", "full"] = "none"  # activation checkpointing: less memory, more time
    nonfinite: Literal["stop", "skip"] = "stop"  # at a loss or gradient that is no number: weights stay as they are
    workers: int = 0  # processes that prepare batches; 0: none, a batch is made when it is needed
    mesh: str = ""  # how ranks share the work, such as "dp=8 tp=4" (docs/parallel.md); without it: dp


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
    async_save: Literal["auto", "on", "off"] = "auto"  # write checkpoints while training goes on; auto: on GPUs
    tensorboard: bool = True  # event files in the run's folder
    track: tuple[Literal["trackio", "wandb"], ...] = ()  # also report to these


@dataclass(frozen=True)
class Train:
    """Train a model on text files."""

    data: tuple[Path, ...] = ()  # text files to learn from, or folders of `oneblock data prepare`
    weights: tuple[float, ...] = ()  # shares of those folders in what is learned; without them: by their tokens
    documents: bool = False  # attention and positions stay inside each document of a row
    val: tuple[Path, ...] = ()  # text files to validate on; without them: the end of the data
    val_share: float = 0.1  # of the data, kept for validation where --val is not given
    tokenizer: str = "chars"  # chars, bytes, bpe (with --vocab), or a folder with a tokenizer
    vocab: int = 4096  # tokens that bpe learns
    model: str = "llama"  # a family or model name (oneblock models), or a config.json
    context: int | None = None  # tokens in a row; without it: the model's, at most 1024
    sizes: Sizes = field(default_factory=Sizes)
    start: Start = field(default_factory=Start)
    dropouts: Dropouts = field(default_factory=Dropouts)
    loop: Loop = field(default_factory=Loop)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    objective: Objective = field(default_factory=Objective)
    watch: Watch = field(default_factory=Watch)
    out: Path | None = None  # the run's folder; without it: runs/ and the next number
    resume: Path | None = None  # a run's folder, to go on from its last checkpoint
    allow_changes: bool = False  # resume although settings differ from those the run began with
    config: Path | None = None  # a TOML file with any of these settings
    gate: bool = True  # refuse a run that the machine's memory or disk cannot hold
    dry_run: bool = False  # say what it would need, and stop
