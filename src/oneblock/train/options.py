"""Options of a training run: each field is a flag and a TOML key, and its comment is the help text. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from oneblock.config import SEED, Range, check_ranges

Natural = Annotated[int, Range(low=1)]
Count = Annotated[int, Range(low=0)]
Probability = Annotated[float, Range(low=0, below=1)]
Share = Annotated[float, Range(low=0, high=1)]
Rate = Annotated[float, Range(low=0)]
Weight = Annotated[float, Range(low=0)]


@dataclass(frozen=True)
class Sizes:
    """Sizes that override those of the named model."""

    dim: Annotated[int | None, Range(low=1)] = None  # model dimension (width of the residual stream)
    n_layers: Annotated[int | None, Range(low=1)] = None  # number of blocks
    n_heads: Annotated[int | None, Range(low=1)] = None  # number of attention heads
    n_kv_heads: Annotated[int | None, Range(low=1)] = None  # number of KV heads; below n_heads: grouped-query attention
    head_dim: Annotated[int | None, Range(low=1)] = None  # dimension of one attention head
    hidden_dim: Annotated[int | None, Range(low=1)] = None  # intermediate dimension of the MLP

    __post_init__ = check_ranges


@dataclass(frozen=True)
class Start:
    """Weight initialisation."""

    zero_init_residual: bool = False  # zero-initialise `wo` and `down`, so that each block starts as the identity
    embed_std: Annotated[float | None, Range(low=0)] = None  # standard deviation of the embedding; default: as matrices

    __post_init__ = check_ranges


@dataclass(frozen=True)
class Dropouts:
    """Dropout probabilities; the four specific ones default to `dropout`."""

    dropout: Probability = 0.0  # dropout probability everywhere
    embed_dropout: Annotated[float | None, Range(low=0, below=1)] = None  # dropout of the embeddings
    attn_dropout: Annotated[float | None, Range(low=0, below=1)] = None  # dropout of the attention weights
    residual_dropout: Annotated[float | None, Range(low=0, below=1)] = None  # dropout of each block's two outputs
    mlp_dropout: Annotated[float | None, Range(low=0, below=1)] = None  # dropout of the MLP's hidden activations

    __post_init__ = check_ranges


@dataclass(frozen=True)
class Optimizer:
    """The optimizer. Norms, biases and embeddings get no weight decay unless `decay_all` is set."""

    # adamw (arXiv:1711.05101); muon (arXiv:2502.16982) for the matrices of the blocks and AdamW for the others;
    # adamw8bit (arXiv:2110.02861): AdamW with 8-bit moments, needs torchao
    optimizer: Literal["adamw", "muon", "adamw8bit"] = "adamw"
    lr: Rate = 1e-3  # peak learning rate
    matrix_lr: Annotated[float | None, Range(above=0)] = None  # peak learning rate of Muon's matrices; default: lr
    beta1: Probability = 0.9  # AdamW: decay of the first moment
    beta2: Probability = 0.99  # AdamW: decay of the second moment
    momentum: Probability = 0.95  # Muon: momentum
    eps: Annotated[float, Range(above=0)] = 1e-8  # AdamW: added to the denominator
    weight_decay: Weight = 0.1  # decoupled weight decay
    decay_all: bool = False  # apply weight decay to norms, biases and embeddings too
    max_grad_norm: Rate = 1.0  # clip the global gradient norm to this; 0: no clipping
    ema: Probability = 0.0  # decay of the exponential moving average (EMA) of the weights, e.g. 0.999; 0: no EMA

    __post_init__ = check_ranges


@dataclass(frozen=True)
class Schedule:
    """Learning rate and batch size over the run."""

    # learning-rate schedule after the warmup; wsd (warmup-stable-decay): constant, then linear decay
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    warmup: Count = 100  # steps of linear learning-rate warmup
    decay: Share = 0.3  # share of the run that the wsd schedule decays for
    min_lr_ratio: Share = 0.0  # final learning rate as a share of lr
    batch_size_warmup_steps: Count = 0  # steps in which the accumulated micro-batches grow from 1 to the full number

    __post_init__ = check_ranges


@dataclass(frozen=True)
class Objective:
    """Auxiliary losses added to the cross-entropy; 0: none."""

    z_loss: Weight = 0.0  # weight of the squared log-sum-exp of the logits (arXiv:2204.02311)
    # how experts get an even load: an auxiliary loss (arXiv:2101.03961), or updates of the router's bias, for models
    # that have one (arXiv:2408.15664)
    load_balancing: Literal["loss", "bias", "none"] = "loss"
    load_balancing_weight: Weight = 0.01  # weight of the load-balancing loss, or step size of the bias updates
    router_z_loss: Weight = 0.0  # weight of the router logits' z-loss (arXiv:2202.08906)

    __post_init__ = check_ranges


@dataclass(frozen=True)
class Loop:
    """Length, batch size, precision and parallelism of the training loop."""

    steps: Natural = 1000  # optimizer steps
    seconds: Annotated[float | None, Range(above=0)] = None  # train for this many seconds instead of a number of steps
    batch_size: Natural = 16  # sequences per micro-batch, over all ranks
    gradient_accumulation_steps: Natural = 1  # micro-batches per optimizer step
    seed: Annotated[int, SEED] = 0  # seed of weights, data order and dropout
    device: str = "cpu"  # cpu, cuda, cuda:1 ...
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast dtype; auto: bfloat16 where the hardware has it
    fp8: bool = False  # float8 matmuls by torchao, needs an Ada, Hopper or newer GPU
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile the blocks; auto: where it pays
    # activation checkpointing: recompute activations in the backward pass; selective: keep the results of matmuls
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    nonfinite: Literal["stop", "skip"] = "stop"  # on a NaN or Inf loss or gradient: stop the run, or skip the step
    workers: Annotated[int, Range(low=0, high=1024)] = 0  # processes that prepare batches; 0: in the training process
    mesh: str = ""  # parallelism degrees such as "dp=8 tp=4" (docs/parallel.md); default: dp over all ranks

    __post_init__ = check_ranges


@dataclass(frozen=True)
class Watch:
    """Logging, validation, samples and checkpoints; an interval of 0: never."""

    log_every: Count = 10  # steps between log lines
    eval_every: Count = 250  # steps between validations
    eval_batches: Count = 0  # validation batches; 0: all of the validation data
    sample_every: Count = 0  # steps between text samples
    sample_tokens: Natural = 120  # tokens of a sample
    prompt: str = "\n"  # prompt of the samples
    save_every: Count = 500  # steps between checkpoints
    keep: Natural = 2  # newest checkpoints to keep
    async_save: Literal["auto", "on", "off"] = "auto"  # write checkpoints in the background; auto: on GPUs
    tensorboard: bool = True  # write TensorBoard event files into the run folder
    track: tuple[Literal["trackio", "wandb"], ...] = ()  # also log to these trackers

    __post_init__ = check_ranges


@dataclass(frozen=True)
class Train:
    """Train a model on text files."""

    data: tuple[Path, ...] = ()  # .txt, .jsonl or .parquet files to train on, or folders of `oneblock data prepare`
    text_field: str = "text"  # field of a JSON line, or column of a table, with the document
    separator: str = ""  # string between the documents of a text file; default: the file is one document
    weights: Annotated[tuple[float, ...], Range(low=0)] = ()  # sampling weights of the folders; default: their tokens
    documents: bool = False  # attention and positions stay within each document of a packed sequence
    val: tuple[Path, ...] = ()  # validation text files; default: the end of the data
    val_share: Probability = 0.1  # share of the data held out for validation if --val is not given
    tokenizer: str | None = None  # chars, bytes, bpe (with --vocab), or a folder; default: that of --init, else chars
    vocab: Natural = 4096  # vocabulary size of a bpe tokenizer
    model: str = "llama"  # architecture: a model or family name (oneblock models), or a config.json
    init: str | None = None  # start from these weights: a model folder, or org/name on the hub
    context: Annotated[int | None, Range(low=1)] = None  # sequence length; default: the model's, at most 1024
    sizes: Sizes = field(default_factory=Sizes)
    start: Start = field(default_factory=Start)
    dropouts: Dropouts = field(default_factory=Dropouts)
    loop: Loop = field(default_factory=Loop)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    objective: Objective = field(default_factory=Objective)
    watch: Watch = field(default_factory=Watch)
    out: Path | None = None  # run folder; default: runs/N with the next free number
    resume: Path | None = None  # run folder to continue from its newest checkpoint
    allow_changes: bool = False  # resume although settings differ from the recorded ones
    config: Path | None = None  # TOML file with any of these options
    preflight: bool = True  # refuse a run that does not fit in memory or on disk
    dry_run: bool = False  # print what the run needs, then exit

    __post_init__ = check_ranges


def flatten(options: Any) -> dict[str, Any]:
    """All fields of a dataclass in one dict, nested dataclasses included."""
    values: dict[str, Any] = {}
    for f in fields(options):
        value = getattr(options, f.name)
        values |= flatten(value) if is_dataclass(value) else {f.name: value}
    return values


def with_changes(options: Any, changes: dict[str, Any]) -> Any:
    """A copy of a dataclass with fields changed by name, wherever they are nested."""
    new = {}
    for f in fields(options):
        value = getattr(options, f.name)
        if is_dataclass(value):
            new[f.name] = with_changes(value, changes)
        elif f.name in changes:
            new[f.name] = changes[f.name]
    return replace(options, **new)
