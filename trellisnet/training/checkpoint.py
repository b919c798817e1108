"""Checkpoints: everything a run needs to go on, in one file that is either whole or not there.

A checkpoint is a dict of tensors and plain values:

    format      version of this layout (`FORMAT`)
    settings    all settings of the run
    command     the command line that started the run
    data        what the data are (`Splits.fingerprint`)
    model       state dict
    optimizer   state dict
    schedule    learning rate and validation history
    epoch       epochs finished
    batch       windows of the next epoch already trained on
    carry       state carried into the next window, or None
    step        updates made
    best        {epoch, valid}: the best validation result, or None
    seconds     wall time of training so far
    running     sums of the unfinished epoch's losses
    rng         states of the random number generators
"""

import os
from typing import Any

import torch

from trellisnet import serialization
from trellisnet.errors import UserError

FORMAT = 1
_KEYS = frozenset(
    "format settings command data model optimizer schedule epoch batch carry step best seconds running rng".split()
)


def rng_state() -> dict[str, Any]:
    """States of torch's generators, CPU and CUDA (the only ones this project draws from)."""
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` returned; CUDA states only where there are as many devices."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def save(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically; `content` has all keys of the layout but `format`."""
    content = {"format": FORMAT, **content}
    assert content.keys() == _KEYS, f"checkpoint keys differ from the layout: {content.keys() ^ _KEYS}"
    serialization.save(path, content)


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        UserError: missing, damaged, no checkpoint, or of a later version.
    """
    what = "a checkpoint of a run (last.pt or best.pt)"
    content = serialization.load(path, what)
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path}: not {what}; weights in the authors' layout are loaded with --load_weight")
    if content["format"] != FORMAT:
        raise UserError(
            f"{path}: checkpoint format {content['format']}, this version reads format {FORMAT}; "
            "continue the run with the version that started it (see its log.txt)"
        )
    if content.keys() != _KEYS:
        raise UserError(f"{path}: not {what}, or a damaged one (keys {sorted(content.keys() ^ _KEYS)})")
    return content
