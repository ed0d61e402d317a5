"""The prompt cache: keys and values of a sequence in a safetensors file, so that later runs skip its prefill."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from oneblock.errors import OneblockError
from oneblock.files import replace_file
from oneblock.infer.cache import StoredKV
from oneblock.infer.generate import Sequences, common_prefix_length
from oneblock.model import Decoder
from oneblock.store.save import write_tensors


def fingerprint(model: Decoder, int8_cache: bool) -> str:
    """A hash of the spec, the dtypes and a sample of the weights: a file serves only the model that wrote it."""
    digest = hashlib.sha256(f"{model.spec} {model.dtype} {'int8' if int8_cache else ''}".encode())
    for x in (*model.parameters(), *model.buffers()):
        sample = x.detach().flatten()[:: max(1, x.numel() // 64)][:64].cpu()
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_prompt_cache(path: Path, sequences: Sequences) -> None:
    """Write ids, keys and values of a batch of one; an existing file is replaced in one step."""
    [row], cache = sequences.rows, sequences.cache
    tensors = {"ids": torch.tensor(row[: cache.length])}
    for layer, pair in zip(cache.text_layers, cache.stored_kv(), strict=True):
        for name, parts in zip(("keys", "values"), pair, strict=True):
            tensors |= {f"{name}.{layer}.{i}": x for i, x in enumerate(parts)}
    with replace_file(path) as temporary:
        write_tensors(temporary, tensors, {"model": fingerprint(sequences.model, cache.quantized)})


def load_prompt_cache(path: Path, sequences: Sequences) -> int:
    """Fill the cache of a batch of one with its prefix that the file holds; the number of tokens that need no prefill.

    OneblockError where the file belongs to another model, or is damaged.
    """
    [row], cache = sequences.rows, sequences.cache
    try:
        with safe_open(path, "pt", device=str(cache.device)) as file:
            if (file.metadata() or {}).get("model") != fingerprint(sequences.model, cache.quantized):
                raise OneblockError(
                    f"{path}: is the prompt cache of another model or KV cache dtype; name another file, or delete it"
                )
            ids = file.get_tensor("ids").tolist()
            parts = range(2 if cache.quantized else 1)

            def stored(name: str) -> StoredKV:
                return tuple(file.get_tensor(f"{name}.{i}") for i in parts)

            pairs = ((stored(f"keys.{n}"), stored(f"values.{n}")) for n in cache.text_layers)
            common = common_prefix_length(ids, row)
            if common < 2 or not cache.restore(pairs, len(ids)) or not cache.rewind(min(common, len(row) - 1)):
                sequences.reset()
                return 0
    except (SafetensorError, OSError) as e:
        raise OneblockError(f"{path}: {str(e).splitlines()[0]}; delete it, and it is written again") from None
    return sequences.cache.length


def check_prompt_cache_path(path: object) -> None:
    """Raise OneblockError unless the path is a str or Path and not a folder."""
    if not isinstance(path, str | Path):
        raise OneblockError(f"prompt_cache is {path!r}, but it must be the path of a file")
    if Path(path).is_dir():
        raise OneblockError(f"{path}: is a folder; name a file in it for the prompt cache")
