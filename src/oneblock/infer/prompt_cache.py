"""A text's keys and values on disk: a long prompt is read once, and its replies begin at once in later runs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from oneblock.errors import OneblockError
from oneblock.files import replace_file
from oneblock.infer.cache import Held
from oneblock.infer.generate import Sequences
from oneblock.model import Decoder
from oneblock.store.save import write_tensors


def fingerprint(model: Decoder, coded: bool) -> str:
    """Of the spec, the dtype, the cache's form and a part of the weights: a cache serves no other model."""
    found = hashlib.sha256(f"{model.spec} {model.dtype} {'8 bits' if coded else ''}".encode())
    for x in (*model.parameters(), *model.buffers()):
        some = x.detach().flatten()[:: max(1, x.numel() // 64)][:64].cpu()
        found.update(some.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def keep(path: Path, texts: Sequences) -> None:
    """Write the only row's ids, keys and values; the old file stays until the new is whole."""
    [row], cache = texts.rows, texts.cache
    held = {"ids": torch.tensor(row[: cache.length])}
    for layer, pair in zip(cache.stored_layers, cache.columns(), strict=True):
        for name, parts in zip(("keys", "values"), pair, strict=True):
            held |= {f"{name}.{layer}.{i}": x for i, x in enumerate(parts)}
    with replace_file(path) as new:
        write_tensors(new, held, {"model": fingerprint(texts.model, cache.coded)})


def take(path: Path, texts: Sequences) -> int:
    """Give the only row what the file has of its beginning; how many tokens need not be read again.

    OneblockError where the file is of another model, or damaged.
    """
    [row], cache = texts.rows, texts.cache
    try:
        with safe_open(path, "pt", device=str(cache.device)) as file:
            if (file.metadata() or {}).get("model") != fingerprint(texts.model, cache.coded):
                raise OneblockError(
                    f"{path}: is the cache of another model, or in other bits: name another file, or delete it"
                )
            ids = file.get_tensor("ids").tolist()
            parts = range(2 if cache.coded else 1)

            def stored(name: str) -> Held:
                return tuple(file.get_tensor(f"{name}.{i}") for i in parts)

            pairs = ((stored(f"keys.{n}"), stored(f"values.{n}")) for n in cache.stored_layers)
            same = next((i for i, (a, b) in enumerate(zip(ids, row, strict=False)) if a != b), min(len(ids), len(row)))
            if same < 2 or not cache.fill(pairs, len(ids)) or not cache.rewind(min(same, len(row) - 1)):
                texts.reset()
                return 0
    except (SafetensorError, OSError) as e:
        raise OneblockError(f"{path}: {str(e).splitlines()[0]}; delete it, and it is made again") from None
    return texts.cache.length
