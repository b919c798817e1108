"""Checkpoints: everything needed to continue a run, in one file that is written atomically.

The file holds `format` (the version of this layout), `content` and `sha256` (the digest of the content). The content is
a dict of tensors and plain values:

    task        the run's task
    settings    all settings of the run
    command     the command line that started the run
    data        digest and sizes of the data (`Splits.fingerprint`)
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
    skipped     steps skipped so far because their loss or gradient was not finite
    rng         states of the random number generators of torch (CPU and current CUDA device), numpy and python
    rng_others  those of the ranks after the first, a list
"""

import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trellisnet import serialization
from trellisnet.errors import NAME, UserError, shown
from trellisnet.serialization import sha256_of

FORMAT = 2
WHAT = "a checkpoint of a run (last.pt or best.pt)"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 2**63)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


def _is_table(value: Any, of: Callable[[Any], bool] = lambda _: True) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) and of(item) for key, item in value.items())


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(of, value))


def _is_data(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 5:
        return False
    return isinstance(value[0], str) and _is_list(value[1:4], _is_count) and isinstance(value[4], str | None)


def _is_optimizer(value: Any) -> bool:
    if not _is_table(value) or not {"state", "param_groups"} <= value.keys() or not isinstance(value["state"], dict):
        return False
    entry = lambda v: v is None or _is_number(v) or isinstance(v, bool) or _is_tensor(v)  # noqa: E731
    states = all(_is_count(key) and _is_table(state, entry) for key, state in value["state"].items())
    return states and _is_list(value["param_groups"], _is_table)


def _is_schedule(value: Any) -> bool:
    if not _is_table(value) or not {"lr", "history", "averaging"} <= value.keys():
        return False
    fits = _is_number(value["lr"]) and value["lr"] >= 0 and isinstance(value["averaging"], bool)
    return fits and _is_list(value["history"], _is_number)


def _is_carry(value: Any) -> bool:
    finite = lambda part: _is_tensor(part) and part.is_floating_point() and serialization.all_finite(part)  # noqa: E731
    return value is None or _is_list(value, finite)


def _is_best(value: Any) -> bool:
    if value is None:
        return True
    if not _is_table(value) or not {"epoch", "valid"} <= value.keys():
        return False
    return _is_count(value["epoch"]) and (value["valid"] is None or _is_table(value["valid"]))


def is_rng_state(value: Any) -> bool:
    """Return whether :func:`set_rng_state` accepts the value, tried on other generators."""
    if not _is_table(value):  # a tensor would warn of its index
        return False
    try:
        torch.Generator().set_state(value["torch"])
        if not _is_list(value["cuda"], lambda state: _is_tensor(state) and state.dtype == torch.uint8):
            return False
        state = _numpy_state(value)
        if not _is_count(state[2]) or state[2] > len(state[1]):
            return False
        np.random.RandomState().set_state(state)
        random.Random().setstate(_python_state(value))
        return value["python"][2] is None or _is_number(value["python"][2])
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError):
        return False


# Checks of the values, by key of the layout.
_FITS: dict[str, Callable[[Any], bool]] = {
    "task": lambda v: isinstance(v, str),
    "settings": _is_table,
    "command": lambda v: isinstance(v, str),
    "data": _is_data,
    "model": lambda v: _is_table(v, _is_tensor),
    "average": lambda v: v is None or _is_table(v, _is_tensor),
    "optimizer": _is_optimizer,
    "schedule": _is_schedule,
    **dict.fromkeys(("epoch", "batch", "step", "skipped"), _is_count),
    "carry": _is_carry,
    "best": _is_best,
    "seconds": _is_number,
    "running": lambda v: _is_table(v, _is_number),
    "rng": is_rng_state,
    "rng_others": lambda v: _is_list(v, is_rng_state),
}


def rng_state() -> dict[str, Any]:
    """States of the random number generators of torch (CPU and current CUDA device), numpy and python.

    The values are tensors and plain values.
    """
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what :func:`rng_state` returned; the current CUDA device may be another one now."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_initialized():
        # Older files hold a state for every device of their machine, by number.
        torch.cuda.set_rng_state(state["cuda"][min(torch.cuda.current_device(), len(state["cuda"]) - 1)])
    np.random.set_state(_numpy_state(state))
    random.setstate(_python_state(state))


def _numpy_state(state: dict[str, Any]) -> tuple[Any, ...]:
    name, keys, *rest = state["numpy"]
    return name, keys.numpy().astype(np.uint32), *rest


def _python_state(state: dict[str, Any]) -> tuple[Any, ...]:
    version, internal, gauss = state["python"]
    return version, tuple(internal), gauss


def save(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically; `content` has all keys of the layout."""
    assert content.keys() == _FITS.keys(), f"checkpoint keys differ from the layout: {content.keys() ^ _FITS.keys()}"
    serialization.save(path, {"format": FORMAT, "sha256": sha256_of(content), "content": content})


def load(path: str | os.PathLike, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        path: the file.
        mmap: leave the tensors in the file, for content that is only inspected or copied.

    Raises:
        UserError: missing, corrupt, no checkpoint, or of another format.
    """
    file = serialization.load(path, WHAT, mmap=mmap)
    if not isinstance(file, dict) or "format" not in file:
        raise UserError(f"{path}: not {WHAT}; weights in the authors' layout are loaded with --load_weight")
    if file["format"] != FORMAT:
        raise UserError(
            f"{path}: checkpoint format {shown(file['format'], NAME)}, this version reads format {FORMAT}; "
            "continue the run with the version that started it (see its log.txt)"
        )
    content = file.get("content")
    if not isinstance(content, dict):
        raise UserError(f"{path}: not {WHAT}, or corrupt")
    try:
        digest = sha256_of(content)
    except (TypeError, RuntimeError) as e:  # no checkpoint holds other objects, sparse tensors or a loop
        raise UserError(f"{path}: not {WHAT}, or corrupt") from e
    if digest != file.get("sha256"):
        raise UserError(f"{path}: corrupt: its content does not match its sha256")
    if content.keys() != _FITS.keys():
        differ = shown(sorted(content.keys() ^ _FITS.keys(), key=repr), NAME)
        raise UserError(f"{path}: not {WHAT}, or corrupt (keys {differ})")
    for key, fits in _FITS.items():
        if not fits(content[key]):
            raise UserError(f"{path}: a corrupt checkpoint ({key}: wrong type or value)")
    return content


def check_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless these are weights of the model, and finite."""
    ours, theirs = ({name: (t.shape, t.dtype) for name, t in w.items()} for w in (model.state_dict(), weights))
    if ours != theirs:
        names = sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        raise ValueError(f"other weights than this model's: {shown(names[0])}")
    if not all(map(serialization.all_finite, weights.values())):
        raise ValueError("weights that are not finite")


def load_best(path: Path, best: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Load best.pt, which must be the one that last.pt describes as `best`; its tensors stay in the file.

    Raises:
        UserError: it is missing, corrupt or of another run.
    """
    try:
        content = load(path, mmap=True)
    except UserError as e:
        weights = path.with_name("weights.pkl")
        raise UserError(f"{e}; restore a copy of it, or start a new run from its weights, {weights}") from e
    if content["best"] != best:
        epoch = content["best"] and content["best"]["epoch"]
        raise UserError(
            f"{path}: holds epoch {epoch}, but last.pt names epoch {best['epoch']}; put the files of one run together"
        )
    # If last.pt and best.pt swapped names, digests would match, but the weights would not be the best.
    # Only the last epoch of a run may be cut short: `epoch` does not count it then.
    if content["epoch"] + (content["batch"] > 0) != best["epoch"]:
        raise UserError(f"{path}: was not written at the end of its epoch; put the files back under their names")
    try:
        check_weights(model, content["average"] or content["model"])
    except ValueError as e:
        raise UserError(f"{path}: a corrupt checkpoint ({e})") from e
    return content
