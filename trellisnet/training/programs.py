"""List of the tasks, and their programs by name."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from trellisnet.training import cli
from trellisnet.training.config import RunConfig
from trellisnet.training.distributed import Ranks
from trellisnet.training.optim import Schedule
from trellisnet.training.tasks import Splits, Task

TASKS = ("word_ptb", "char_ptb", "wt103", "pmnist", "cifar10")


@dataclass(frozen=True)
class Program:
    """A task's train.py. Each kind of task has a subclass with `build_model` and :meth:`setup`.

    Args:
        config_class: the settings, with the task's defaults and presets.
        load: reads the data: `load(folder, download, …)`.

    Attributes:
        build_model: returns the model for an instance of `config_class` and the sizes of the data.
    """

    config_class: type[RunConfig]
    load: Callable[..., Any]
    build_model: ClassVar[Callable[..., nn.Module]]

    def setup(
        self, config: RunConfig, device: torch.device, ranks: Ranks | None = None
    ) -> tuple[Task, Splits, Schedule, dict[str, Any]]:
        """Read the data and build the model.

        Args:
            config: the settings, an instance of `config_class`.
            device: where to train.
            ranks: the processes that train together; by default this one is alone.

        Returns:
            the task, its data, the learning-rate schedule, and facts for the log.

        Raises:
            UserError: data that cannot be read or do not suit the settings.
        """
        raise NotImplementedError

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the program; see :func:`trellisnet.training.cli.main`."""
        return cli.main(self.config_class, self.setup, argv)


def get(task: str) -> Program:
    """Import and return the program of a task, which its folder holds as `train.program`."""
    return importlib.import_module(f"{task}.train").program
