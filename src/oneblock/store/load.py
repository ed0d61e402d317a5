"""A model folder to a model: built on the meta device, then given memory-mapped tensors or copies made in chunks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from oneblock.errors import OneblockError
from oneblock.kernels.substitution import set_tensor
from oneblock.model import Decoder
from oneblock.spec import Spec
from oneblock.store import name_tables
from oneblock.store import tensors as stored
from oneblock.store.config import family_of, read_config, read_json
from oneblock.store.name_tables import DiskTensor, DiskTensors, Family, Layout, is_ignored
from oneblock.store.tensors import CODES, DOWNLOAD_AGAIN, DTYPES, TensorInfo, TensorReader, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GENERATION = "generation_config.json"
WORKERS = 4  # chunks in memory at a time
PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.msgpack", "*.h5")

Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model. `layout` lets `save_model` write the same tensor names again."""

    model: Decoder
    spec: Spec
    config: dict[str, Any]
    generation: dict[str, Any] = field(default_factory=dict)
    layout: Layout | None = None


def load_model(
    folder: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Checkpoint:
    """Load the model of a Hugging Face folder, its weights in `dtype` (None: the dtype of most of them).

    On the CPU, without a change of dtype, the weights are memory-mapped: pages are read when used and copied only
    when written to. OneblockError if the folder is not a complete, undamaged model.
    """
    folder, on = Path(folder), check_device(device)
    spec, config = read_config(folder)
    if config.get("quantization_config"):
        raise OneblockError(f"{folder}: its weights are quantized, for inference only; give the model it was made from")
    family = family_of(config)
    infos = read_headers(folder)
    model = build_on_meta(spec)
    match = _match_names(family, spec, model, infos)
    head = match.head if match.layout.stored_head else None
    check_tensors(folder, match.disk_tensors, infos, DTYPES, lambda name: name == head or is_ignored(name, family))
    target = choose_dtype(dtype, match.disk_tensors, infos)
    if head and not _is_same_matrix(infos, match):
        # transformers trusts the two matrices over the configuration, too
        config, spec = {**config, "tie_word_embeddings": False}, replace(spec, tied=False)
        model = build_on_meta(spec)
        match = _match_names(family, spec, model, infos)
    fill_model(model, match.disk_tensors, infos, target, on)
    return Checkpoint(model, spec, config, read_generation_config(folder), match.layout)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The folder's generation_config.json; empty if there is none."""
    path = folder / GENERATION
    return read_json(path) if path.exists() else {}


def build_on_meta(spec: Spec) -> Decoder:
    """The model without memory for its weights."""
    with torch.device("meta"), _SkipInit():
        return Decoder(spec)


class _SkipInit(TorchFunctionMode):
    """Skips weight initialization: even on the meta device it costs a second of imports inside torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.normal_ or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes. A tied head is not among them: its parameter is the embedding."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


# ------------------------------------------------------------------ files


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a folder's safetensors files."""
    if (folder / INDEX).exists():
        return _read_shard_headers(folder)
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise OneblockError(
            f"{folder}: {pickles[0]} is a pickle, which could run code when opened; if you trust it, convert it: "
            f'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained({str(folder)!r}).save_pretrained('converted')\""
        )
    raise OneblockError(f"{folder}: has no {SINGLE} and no {INDEX}; give a folder that holds a model's weights")


def _read_shard_headers(folder: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise OneblockError(f"{folder / INDEX}: has no weight_map of tensors to files in this folder; {DOWNLOAD_AGAIN}")
    infos: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).exists():
            raise OneblockError(f"{folder / file}: is missing, but {INDEX} names it; download it")
        for name, info in read_header(folder / file).items():
            if name in infos:
                raise OneblockError(
                    f"{folder / file}: tensor {name!r} is in {infos[name].path.name} too; download both again"
                )
            infos[name] = info
    for name, file in weight_map.items():
        if name not in infos or infos[name].path.name != file:
            raise OneblockError(f"{folder / file}: tensor {name!r} is missing, but {INDEX} names it; {DOWNLOAD_AGAIN}")
    return infos


# ------------------------------------------------------------------ names


@dataclass(frozen=True)
class Match:
    """The stored tensors a model needs, named as this folder names them."""

    disk_tensors: DiskTensors
    layout: Layout
    head: str = ""  # the stored name of a tied head


def _match_names(family: Family, spec: Spec, model: Decoder, infos: Infos) -> Match:
    """The family's naming scheme that leaves the fewest tensors missing."""
    shapes = parameter_shapes(model)
    tables = [name_tables.map_tensors(table, spec, shapes) for table in family.tables]
    best: Match | None = None
    fewest = len(shapes) * 1000
    for table, prefix, rename in name_tables.naming_schemes(family):
        known = tables[table]
        if known is None:
            continue
        renamed = {rename(name): disk for name, disk in known.items()}
        missing = len(renamed.keys() - infos.keys())
        if missing < fewest:
            head = rename(head_name(family))
            is_text_model = prefix in name_tables.WRAPPER_PREFIXES  # of an image-text model
            saved_prefix = None if is_text_model else prefix
            layout = Layout(family.model_types[0], table, saved_prefix, stored_head=spec.tied and head in infos)
            best, fewest = Match(renamed, layout, head), missing
    assert best is not None, f"no table of {family.model_types[0]} names every parameter"
    return best


def head_name(family: Family) -> str:
    return next(disk for disk, ours in family.tables[0].items() if ours == "head") + ".weight"


def _is_same_matrix(infos: Infos, match: Match) -> bool:
    """Whether the stored head equals the embedding."""
    embed = next(name for name, disk in match.disk_tensors.items() if disk.parts[0].name == "embed.weight")
    a, b = infos[embed], infos[match.head]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    rows, columns = a.shape
    with TensorReader(a) as ours, TensorReader(b) as theirs:  # not mapped: pages that were read stay in memory
        return all(
            torch.equal(ours.read((columns,), i * columns), theirs.read((columns,), i * columns)) for i in range(rows)
        )


# ------------------------------------------------------------------ what safetensors and GGUF have in common


def check_tensors(
    source: Path, disk_tensors: DiskTensors, infos: Infos, codes: Collection[str], is_ignorable: Callable[[str], bool]
) -> None:
    """Raise OneblockError if a tensor is missing, unexpected, of another shape, or of a dtype not in `codes`."""
    missing = [name for name in disk_tensors if name not in infos]
    if missing:
        raise OneblockError(
            f"{source}: tensor {missing[0]!r} is missing{_and_more(missing)}; the weights are incomplete or do not "
            f"belong to the configuration: download them again"
        )
    for name, disk in disk_tensors.items():
        info = infos[name]
        if info.shape != disk.shape:
            raise OneblockError(
                f"{info.path}: tensor {name!r} has shape {list(info.shape)}, but the configuration requires "
                f"{list(disk.shape)}; download the model again, or fix its configuration"
            )
        if info.dtype not in codes or (info.dtype not in DTYPES and len(info.shape) == 1):
            raise OneblockError(
                f"{info.path}: tensor {name!r} is {info.dtype}, which is not supported here; get the model in one of "
                f"{', '.join(codes)}"
            )
    unexpected = [name for name in infos if name not in disk_tensors and not is_ignorable(name)]
    if unexpected:
        raise OneblockError(
            f"{infos[unexpected[0]].path}: tensor {unexpected[0]!r} has no place in this model"
            f"{_and_more(unexpected)}; the configuration may belong to another model: download both again"
        )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def choose_dtype(dtype: str | torch.dtype | None, disk_tensors: DiskTensors, infos: Infos) -> torch.dtype:
    """`dtype`, or the one that most bytes are stored in; block-quantized tensors count as bfloat16."""
    if dtype is not None:
        return as_dtype(dtype)
    sizes: Counter[torch.dtype] = Counter()
    for info in (infos[name] for name in disk_tensors):
        sizes[DTYPES.get(info.dtype, torch.bfloat16)] += info.end - info.start
    return sizes.most_common(1)[0][0]


def as_dtype(name: str | torch.dtype) -> torch.dtype:
    """A dtype by its name. OneblockError if models do not compute in it."""
    dtype = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else name
    if dtype not in CODES:
        known = ", ".join(str(d).removeprefix("torch.") for d in CODES)
        raise OneblockError(f"dtype {name!r} is not supported; choose one of {known}")
    return dtype


def check_device(device: object) -> torch.device:
    """The device; OneblockError naming the available ones where this machine does not have it."""
    available = ["cpu"]
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and torch.accelerator.is_available():
        available += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    try:
        checked = torch.device(device) if isinstance(device, str | torch.device) else None
    except RuntimeError:
        checked = None
    if checked is None or str(checked) not in available:
        raise OneblockError(f"device {str(device)!r} is not available here; available: {', '.join(available)}")
    return checked


def fill_model(
    model: Decoder, disk_tensors: DiskTensors, infos: Infos, dtype: torch.dtype, device: torch.device
) -> None:
    """Give a meta model its weights: memory-mapped if layouts match, otherwise allocated once and copied in chunks."""
    shapes = parameter_shapes(model)
    maps, tensors = stored.FileMaps(), dict[str, Tensor]()
    copies: list[tuple[TensorInfo, DiskTensor]] = []
    for name, disk in sorted(disk_tensors.items(), key=lambda item: (str(infos[item[0]].path), infos[item[0]].start)):
        if stored.is_mappable(infos[name], disk, dtype, device):
            tensors |= maps.parts(infos[name], disk)
        else:
            copies.append((infos[name], disk))
    for name in dict.fromkeys(part.name for _, disk in copies for part in disk.parts):
        tensors[name] = torch.empty(shapes[name], dtype=dtype, device=device)
    if copies:
        _copy_all(copies, tensors)
    for name, tensor in tensors.items():
        set_tensor(model, name, nn.Parameter(tensor))
    model.tie()


def _copy_all(copies: list[tuple[TensorInfo, DiskTensor]], tensors: dict[str, Tensor]) -> None:
    """Copy stored tensors in parallel, each in one thread: torch's own threads would synchronize at every chunk."""
    before = torch.get_num_threads()
    workers = ThreadPoolExecutor(min(WORKERS, before), initializer=torch.set_num_threads, initargs=(1,))
    try:
        with workers:
            # the list raises what a thread raised
            list(workers.map(lambda copy: stored.copy_in(copy[0], copy[1], tensors), copies))
    finally:
        torch.set_num_threads(before)  # part of the setting is global to the process
