"""Shared by several programs: bounds of flags, and the origin of a record."""

import argparse
import platform
from collections.abc import Sequence
from typing import Any

import torch

from trellisnet.errors import UserError
from trellisnet.training.runlog import command_line, commit, machine

LARGEST = 2**31 - 1


def check_bounds(args: argparse.Namespace, **least: int) -> None:
    """Raise UserError for a flag whose number, or one of whose numbers, is below its bound or does not fit 32 bits."""
    for name, bound in least.items():
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if not bound <= number <= LARGEST:
                expected = f"at least {bound}" if number < bound else f"at most {LARGEST}"
                raise UserError(f"--{name}: expected {expected}, got {number}")


def origin(program: str, argv: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Command, machine, versions and commit of a measurement, for the head of its record."""
    return {
        "command": command_line(program, argv),
        "machine": machine(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }
