"""Checkpoints: everything a run needs to go on, in one file that is either whole or not there.

The file holds `format` (the version of this layout), `sha256` and `content`; the content is a dict of tensors and plain
values:

    settings    all settings of the run
    command     the command line that started the run
    data        what the data are (`Splits.fingerprint`)
    model       state dict
    average     state dict with the averaged weights in it, or None before averaging starts
    optimizer   state dict
    schedule    learning rate, validation history, whether averaging has started
    epoch       epochs finished
    batch       windows of the next epoch already trained on
    carry       state carried into the next window, or None
    step        updates made
    best        {epoch, valid}: the best validation result, or None
    seconds     wall time of training so far
    running     sums of the unfinished epoch's losses
    rng         states of the random number generators of torch (CPU and CUDA), numpy and python
"""

import hashlib
import io
import os
import random
from typing import Any

import numpy as np
import torch

from trellisnet import serialization
from trellisnet.errors import UserError

FORMAT = 1
WHAT = "a checkpoint of a run (last.pt or best.pt)"
_KEYS = frozenset(
    "settings command data model average optimizer schedule epoch batch carry step best seconds running rng".split()
)


def rng_state() -> dict[str, Any]:
    """States of the random number generators of torch (CPU and CUDA), numpy and python, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` returned; CUDA states only where there are as many devices."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def save(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically; `content` has all keys of the layout."""
    assert content.keys() == _KEYS, f"checkpoint keys differ from the layout: {content.keys() ^ _KEYS}"
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    sha256 = hashlib.sha256(buffer.getbuffer()).hexdigest()
    serialization.save(path, {"format": FORMAT, "sha256": sha256, "content": data})


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        UserError: missing, damaged, no checkpoint, or of a later version.
    """
    file = serialization.load(path, WHAT)
    if not isinstance(file, dict) or "format" not in file:
        raise UserError(f"{path}: not {WHAT}; weights in the authors' layout are loaded with --load_weight")
    if file["format"] != FORMAT:
        raise UserError(
            f"{path}: checkpoint format {file['format']}, this version reads format {FORMAT}; "
            "continue the run with the version that started it (see its log.txt)"
        )
    data = file.get("content")
    if not isinstance(data, torch.Tensor) or data.dtype != torch.uint8:
        raise UserError(f"{path}: not {WHAT}, or a damaged one")
    stored = io.BytesIO(data.numpy().tobytes())
    if hashlib.sha256(stored.getbuffer()).hexdigest() != file.get("sha256"):
        raise UserError(f"{path}: damaged: its content does not match its sha256")
    content = serialization.read(stored, path, WHAT)
    if not isinstance(content, dict):
        raise UserError(f"{path}: not {WHAT}, or a damaged one")
    if content.keys() != _KEYS:
        raise UserError(f"{path}: not {WHAT}, or a damaged one (keys {sorted(content.keys() ^ _KEYS)})")
    return content
