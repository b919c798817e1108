"""Passes of a Monte Carlo evaluation, kept in a file so that a stopped evaluation can continue."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trellisnet import serialization
from trellisnet.errors import UserError, counted
from trellisnet.training.checkpoint import is_rng_state, rng_state, set_rng_state

WHAT = "a file of --mc_file"
SECONDS = 10  # between writes


class Passes:
    """Sums over the passes so far, by name of the evaluation.

    The file also holds the state of the random number generators after the last pass, so that a continued evaluation
    ends, on the same machine, with the result of an uninterrupted one.

    Args:
        path: the file; created if missing.
        key: computes a digest of everything except their number that the passes depend on, current weights included.
    """

    def __init__(self, path: Path, key: Callable[[], str]):
        self.path, self.key = path, key
        self.written = time.monotonic()

    def restore(self, name: str, passes: int, device: torch.device) -> tuple[int, Tensor | None]:
        """Read the passes of an evaluation, and continue with their random numbers.

        Args:
            name: of the evaluation.
            passes: number that is asked for.
            device: of the sums.

        Returns:
            the number of passes, and the logarithm of the summed probabilities of each target, 1-D float64.

        Raises:
            UserError: the file is corrupt, has more passes, or was written for other weights, data or settings.
        """
        if name not in (kept := self._read()):
            return 0, None
        done, total = kept[name]["passes"], kept[name]["total"]
        if done > passes:
            raise UserError(
                f"{self.path}: holds {counted(done, 'passes')} of {name}; ask for as many with --mc_dropout"
            )
        set_rng_state(kept[name]["rng"])
        return done, total.to(device)

    def keep(self, name: str, passes: int, total: Tensor, last: bool) -> None:
        """Write the passes so far, after the `last` one and at most every ten seconds before it."""
        if last or time.monotonic() - self.written > SECONDS:
            state = {"passes": passes, "total": total.cpu(), "rng": rng_state()}
            serialization.save(self.path, {"key": self.key(), "evaluations": self._read() | {name: state}})
            self.written = time.monotonic()

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self.path.exists():
            return {}
        content = serialization.load(self.path, WHAT)
        if not isinstance(content, dict) or content.keys() != {"key", "evaluations"}:
            raise UserError(f"{self.path}: not {WHAT}, or corrupt; name another file")
        if content["key"] != self.key():
            raise UserError(f"{self.path}: holds passes with other weights, data or settings; name another --mc_file")
        if not isinstance(content["evaluations"], dict) or not all(map(_is_state, content["evaluations"].values())):
            raise UserError(f"{self.path}: not {WHAT}, or corrupt; name another file")
        return content["evaluations"]


def _is_state(state: Any) -> bool:
    if not isinstance(state, dict) or state.keys() != {"passes", "total", "rng"}:
        return False
    passes, total = state["passes"], state["total"]
    sums = isinstance(total, Tensor) and total.dtype == torch.float64 and total.dim() == 1
    return type(passes) is int and passes > 0 and sums and is_rng_state(state["rng"])
