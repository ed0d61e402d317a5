"""Options to a model specification, a tokenizer, and training and validation ids."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from oneblock.config import nearest
from oneblock.data.documents import DocumentFormat, read_texts, tokenize
from oneblock.data.packed import PackedDataset
from oneblock.data.shards import is_shard_folder, read_shard_folder, read_shard_folders
from oneblock.data.tokens import Tokens, concatenate_tokens
from oneblock.errors import OneblockError
from oneblock.model import Dropout
from oneblock.spec import Spec, get_spec
from oneblock.store import manifest, read_config, resolve, resolve_architecture
from oneblock.text import Tokenizer
from oneblock.text.train import byte_level, characters, train_bpe
from oneblock.train.options import Dropouts, Loop, Start, Train

DEFAULT_CONTEXT = 1024  # longest sequence length that is chosen without --context


@dataclass(frozen=True)
class Job:
    """The model to train and the data to train it on."""

    spec: Spec
    tokenizer: Tokenizer
    context: int  # sequence length in tokens
    texts: tuple[Tokens, ...]  # training ids
    val: Tokens | None
    fingerprint: str  # of the training ids; a resumed run must read the same
    weights: tuple[float, ...] = ()  # sampling weights of the texts
    documents: bool = False  # attention stays within each document
    init: Path | None = None  # folder of the weights to start from; None: random weights, or a resumed run

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a sample's prompt; the first training token for an empty one or a newline the tokenizer lacks."""
        try:
            ids = self.tokenizer.encode(prompt)
        except OneblockError:
            if prompt.strip():
                raise
            ids = []
        return ids or self.texts[0].read(0, 1).tolist()

    def rows(self, loop: Loop) -> PackedDataset:
        return PackedDataset(self.texts, self.context, loop.batch_size, loop.seed, self.weights, self.documents)


def prepare(options: Train, checkpoint: Path | None = None) -> Job:
    """Read, tokenize and split the text, and choose the architecture.

    `checkpoint`: the folder that a run resumes from, which brings the tokenizer and, after --init, the architecture.
    """
    init = None if options.init is None else checkpoint or check_init(options)
    source = checkpoint or (init if options.tokenizer is None else None)
    data = load_data(options, None if source is None else Tokenizer.load(source))
    spec, context = spec_for(options, data.tokenizer.vocab_size, init)
    if data.val is not None and len(data.val) < context + 1:
        raise OneblockError(
            f"the validation text has {len(data.val):,} tokens, fewer than one sequence of {context:,} and its next "
            f"token: give --val FILES, a larger --val-share, more text or a smaller --context"
        )
    new = init if checkpoint is None else None
    job = Job(
        spec, data.tokenizer, context, data.texts, data.val, data.fingerprint, options.weights, options.documents, new
    )
    job.rows(options.loop)  # raises where the text is too short
    check_prompt(options, job)
    return job


def check_init(options: Train) -> Path:
    """The folder of --init. OneblockError beside options that only a new model takes."""
    assert options.init is not None
    if options.model not in (Train.model, options.init):
        raise OneblockError(f"--init {options.init} has its own architecture: leave out --model {options.model}")
    if options.start != Start():
        raise OneblockError("--zero-init-residual and --embed-std are for random weights: leave them out with --init")
    folder = resolve(options.init)
    if not folder.is_dir():
        raise OneblockError(f"--init {options.init} is a file: give a folder with config.json and safetensors")
    return folder


def check_prompt(options: Train, job: Job) -> None:
    """Raise OneblockError for a sample prompt that fills the model's context, before the first step."""
    length = len(job.prompt_ids(options.watch.prompt))
    if length >= job.spec.context:
        raise OneblockError(
            f"--prompt has {length:,} tokens, but the model's context is {job.spec.context:,}: shorten the prompt or "
            f"raise --context"
        )


# ------------------------------------------------------------------ data


@dataclass(frozen=True)
class Data:
    """Training and validation ids and their tokenizer."""

    tokenizer: Tokenizer
    texts: tuple[Tokens, ...]
    val: Tokens | None
    fingerprint: str


def load_data(options: Train, tokenizer: Tokenizer | None) -> Data:
    """The ids of text files or of prepared folders. `tokenizer`: that of the weights, if there are any."""
    shards = [path for path in options.data if is_shard_folder(path)]
    if shards and len(shards) < len(options.data):
        other = next(path for path in options.data if path not in shards)
        raise OneblockError(f"{shards[0]} is prepared data and {other} is not: prepare it too (oneblock data prepare)")
    if options.weights and not shards:
        raise OneblockError("--weights are for folders of prepared data (oneblock data prepare)")
    return load_shards(options, tokenizer) if shards else load_texts(options, tokenizer)


def load_texts(options: Train, tokenizer: Tokenizer | None) -> Data:
    """Documents of files; without --val the end of the tokens is held out for validation."""
    layout = DocumentFormat(options.text_field, options.separator)
    texts, val_texts = read_texts(options.data, layout), read_texts(options.val, layout) if options.val else None
    tokenizer = tokenizer or tokenizer_for(options, [*texts, *(val_texts or [])])
    tokens = tokenize(texts, tokenizer)
    train, val = split(tokens, options.val_share) if val_texts is None else (tokens, tokenize(val_texts, tokenizer))
    ids = train.read(0, len(train)).astype(tokens.parts[0].dtype)
    return Data(tokenizer, (train,), val, f"{len(ids)}-{zlib.crc32(ids.tobytes()):08x}")


def split(text: Tokens, share: float) -> tuple[Tokens, Tokens | None]:
    """Training and validation part; the latter is the last `share` of the text."""
    cut = int(len(text) * (1 - share))
    return text.slice(0, cut), text.slice(cut, len(text)) if cut < len(text) else None


def load_shards(options: Train, expected: Tokenizer | None) -> Data:
    """Prepared folders; validation uses --val, their own `val` folders, or the end of the first."""
    folders, tokenizer = read_shard_folders(options.data)
    name = f"--init {options.init}" if options.tokenizer is None else f"--tokenizer {options.tokenizer}"
    expected = tokenizer_for(options, []) if options.tokenizer is not None else expected
    if expected is not None and expected.definition() != tokenizer.definition():
        raise OneblockError(
            f"{options.data[0]} was made by another tokenizer ({tokenizer.vocab_size:,} tokens) than that of {name} "
            f"({expected.vocab_size:,}): prepare the data with it"
        )
    val_folders = options.val or tuple(path / "val" for path in options.data if is_shard_folder(path / "val"))
    texts = [shards.open() for shards in folders]
    if val_folders:
        read_shard_folders([*options.data, *val_folders])  # raises where tokenizers differ
        val = concatenate_tokens([read_shard_folder(path).open() for path in val_folders])
    else:
        texts[0], val = split(texts[0], options.val_share)
    marks = "-".join(str(manifest.hash_file(x.folder / manifest.MANIFEST)["sha256"])[:8] for x in folders)
    return Data(tokenizer, tuple(texts), val, f"{sum(map(len, texts))}-{marks}")


def tokenizer_for(options: Train, texts: Sequence[str]) -> Tokenizer:
    """The tokenizer that --tokenizer names, trained on `texts` where it is not a folder."""
    match options.tokenizer:
        case None | "chars":
            return characters("".join(texts))
        case "bytes":
            return byte_level()
        case "bpe":
            return train_bpe(texts, options.vocab)
    if not Path(options.tokenizer).exists():
        hint = nearest(options.tokenizer, ("chars", "bytes", "bpe"))
        raise OneblockError(f"no tokenizer {options.tokenizer!r}{hint or ': give chars, bytes, bpe or a folder'}")
    return Tokenizer.load(options.tokenizer)


# ------------------------------------------------------------------ architecture


def spec_for(options: Train, vocab: int, init: Path | None = None) -> tuple[Spec, int]:
    """The architecture and the sequence length: of the weights in `init`, of a config.json, or of a named model."""
    sizes = {key: value for key, value in asdict(options.sizes).items() if value is not None}
    path = init or resolve_architecture(options.model)
    if init is None and path is not None and path.is_dir() and any(path.glob("*.safetensors")):
        raise OneblockError(
            f"--model takes an architecture, but {path} holds weights: --init {path} starts from them, "
            f"--model {path}/config.json starts from random weights"
        )
    if path is not None:
        if sizes:
            raise OneblockError(
                f"{options.init or path} has its own sizes: name a model (oneblock models) to change {', '.join(sizes)}"
            )
        return spec_from_config(path, options, vocab)
    if options.context is not None:
        sizes["context"] = options.context
    spec = get_spec(options.model, vocab=vocab, **sizes)
    return spec, options.context or min(spec.context, DEFAULT_CONTEXT)


def spec_from_config(path: Path, options: Train, vocab: int) -> tuple[Spec, int]:
    """The architecture of a config.json or its folder, which the tokenizer and the context must fit."""
    spec = read_config(path)[0]
    if spec.vocab < vocab:
        raise OneblockError(
            f"{path} has a vocabulary of {spec.vocab:,}, but the tokenizer has {vocab:,} tokens: "
            f"give the tokenizer that belongs to it with --tokenizer FOLDER"
        )
    context = options.context or min(spec.context, DEFAULT_CONTEXT)
    if context > spec.context:
        raise OneblockError(f"--context {context:,} is above the {spec.context:,} tokens of {path}")
    return spec, context


def dropout_of(options: Dropouts) -> Dropout | None:
    """The model's dropout probabilities; None where all are zero."""

    def or_default(p: float | None) -> float:
        return options.dropout if p is None else p

    dropout = Dropout(
        embed=or_default(options.embed_dropout),
        attn=or_default(options.attn_dropout),
        residual=or_default(options.residual_dropout),
        mlp=or_default(options.mlp_dropout),
    )
    return None if dropout == Dropout() else dropout
