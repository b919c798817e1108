"""Checkpoints: everything a run needs to go on, in one file that is either whole or not there.

The file holds `format` (the version of this layout), `content` and `sha256` (the digest of the content). The content is
a dict of tensors and plain values:

    task        the run's task; older checkpoints do not have it, and load as None
    settings    all settings of the run
    command     the command line that started the run
    data        what the data are (`Splits.fingerprint`)
    model       state dict
    average     state dict with the averaged weights in it (--asgd, --ema), or None before averaging starts
    optimizer   state dict
    schedule    learning rate, validation history, whether averaging has started
    epoch       epochs finished
    batch       windows of the next epoch already trained on
    carry       state carried into the next window, of the rows of all ranks in their order, or None
    step        updates made
    best        {epoch, valid}: the best validation result, or None
    seconds     wall time of training so far
    running     sums of the unfinished epoch's losses
    skipped     steps skipped so far because their loss or gradient was not finite; not in older checkpoints
    rng         states of the random number generators of torch (CPU and CUDA), numpy and python
    rng_others  those of the ranks after the first, a list; not in older checkpoints

Format 1 differs from it in this: its content is what torch.save makes of this dict, as a tensor of bytes.
"""

import hashlib
import io
import os
import random
from typing import Any

import numpy as np
import torch

from trellisnet import serialization
from trellisnet.errors import NAME, UserError, shown
from trellisnet.serialization import sha256_of

FORMAT = 2
WHAT = "a checkpoint of a run (last.pt or best.pt)"
_KEYS = frozenset(
    """task settings command data model average optimizer schedule epoch batch carry step best seconds running
    skipped rng rng_others""".split()
)


def rng_state() -> dict[str, Any]:
    """States of the random number generators of torch (CPU and CUDA), numpy and python, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
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
    serialization.save(path, {"format": FORMAT, "sha256": sha256_of(content), "content": content})


def load(path: str | os.PathLike, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        path: the file.
        mmap: leave the tensors in the file, for content that is only looked at or copied.

    Raises:
        UserError: missing, damaged, no checkpoint, or of a later version.
    """
    file = serialization.load(path, WHAT, mmap=mmap)
    if not isinstance(file, dict) or "format" not in file:
        raise UserError(f"{path}: not {WHAT}; weights in the authors' layout are loaded with --load_weight")
    if file["format"] not in (1, FORMAT):
        raise UserError(
            f"{path}: checkpoint format {shown(file['format'], NAME)}, this version reads format {FORMAT}; "
            "continue the run with the version that started it (see its log.txt)"
        )
    content = file.get("content")
    if file["format"] == 1:
        content = _unpacked(content, file.get("sha256"), path)
    elif isinstance(content, dict):
        try:
            ours = sha256_of(content)
        except (TypeError, RuntimeError) as e:  # what no checkpoint holds: other objects, sparse tensors, a loop
            raise UserError(f"{path}: not {WHAT}, or a damaged one") from e
        _check_sum(ours, file.get("sha256"), path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: not {WHAT}, or a damaged one")
    content.setdefault("task", None)
    content.setdefault("skipped", 0)
    content.setdefault("rng_others", [])
    if content.keys() != _KEYS:
        raise UserError(
            f"{path}: not {WHAT}, or a damaged one (keys {shown(sorted(content.keys() ^ _KEYS, key=repr), NAME)})"
        )
    return content


def _unpacked(data: Any, sha256: Any, path: str | os.PathLike) -> Any:
    """The content of a file of format 1."""
    if not isinstance(data, torch.Tensor) or data.dtype != torch.uint8:
        raise UserError(f"{path}: not {WHAT}, or a damaged one")
    stored = io.BytesIO(data.numpy().tobytes())
    _check_sum(hashlib.sha256(stored.getbuffer()).hexdigest(), sha256, path)
    return serialization.read(stored, path, WHAT)


def _check_sum(ours: str, theirs: Any, path: str | os.PathLike) -> None:
    if ours != theirs:
        raise UserError(f"{path}: damaged: its content does not match its sha256")
