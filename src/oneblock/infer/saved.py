"""A text's keys and values on disk: a long prompt is read once, and its replies begin at once in later runs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from oneblock.errors import OneblockError
from oneblock.infer.generate import Texts
from oneblock.model import Decoder
from oneblock.store.folder import replacing_file


def fingerprint(model: Decoder) -> str:
    """Of the spec, the dtype and a part of the weights: a cache serves no other model."""
    found = hashlib.sha256(f"{model.spec} {model.dtype}".encode())
    for x in (*model.parameters(), *model.buffers()):
        some = x.detach().flatten()[:: max(1, x.numel() // 64)][:64].cpu()
        found.update(some.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def keep(path: Path, texts: Texts) -> None:
    """Write the only row's ids, keys and values; the old file stays until the new is whole."""
    [row], cache = texts.rows, texts.cache
    held = {"ids": torch.tensor(row[: cache.length])}
    for layer, (k, v) in enumerate(cache.columns()):
        held |= {f"keys.{layer}": k, f"values.{layer}": v}
    with replacing_file(path) as new:
        try:
            save_file(held, new, {"model": fingerprint(texts.model)})
        except SafetensorError as e:  # what it makes of a full disk
            raise OSError(str(e)) from None


def take(path: Path, texts: Texts) -> int:
    """Give the only row what the file has of its beginning; how many tokens need not be read again.

    OneblockError where the file is of another model, or damaged.
    """
    [row], cache = texts.rows, texts.cache
    try:
        with safe_open(path, "pt", device=str(cache.device)) as file:
            if (file.metadata() or {}).get("model") != fingerprint(texts.model):
                raise OneblockError(f"{path}: is another model's prompt cache: name another file, or delete it")
            ids = file.get_tensor("ids").tolist()
            pairs = ((file.get_tensor(f"keys.{n}"), file.get_tensor(f"values.{n}")) for n in cache.stored_layers)
            same = next((i for i, (a, b) in enumerate(zip(ids, row, strict=False)) if a != b), min(len(ids), len(row)))
            if same < 2 or not cache.fill(pairs, len(ids)) or not cache.rewind(min(same, len(row) - 1)):
                texts.forget()
                return 0
    except (SafetensorError, OSError) as e:
        raise OneblockError(f"{path}: {str(e).splitlines()[0]}; delete it, and it is made again") from None
    return texts.cache.length
