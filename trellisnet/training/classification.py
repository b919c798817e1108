"""Settings, presets and program of the tasks that classify images pixel by pixel.

A task folder adds its data, the mean and deviation of its pixels, and whether they are permuted.
"""

import functools
import hashlib
import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trellisnet.baselines import TCN
from trellisnet.core import TrellisNet
from trellisnet.data.augmentation import AffineMaps
from trellisnet.data.pixels import normalise, permutation
from trellisnet.errors import UserError
from trellisnet.models import TrellisClassifier
from trellisnet.training.allocator import keep_freed_memory
from trellisnet.training.core_config import CoreConfig
from trellisnet.training.distributed import Ranks
from trellisnet.training.optim import Schedule, make_schedule
from trellisnet.training.programs import Program
from trellisnet.training.settings import setting
from trellisnet.training.tasks import Classification, Splits

DILATION = [1, 1, *(2**i for i in range(1, 10))]  # one output sees 1,025 pixels
PAPER = {"nhid": 100, "nlevels": 16, "lr": 2e-3, "dropout": 0.2, "wdecay": 1e-6}
# Table 5, "(P)MNIST/CIFAR-10". Its 100 hidden channels are far from the 8M parameters of Table 4, which take 990.
RECIPE = {
    "precision": "bf16", "init_gain": 2.0, "optim": "Adam", "lr": 0.01, "schedule": "onecycle", "epochs": 20,
    "ema": 0.999, "label_smoothing": 0.1, "dropout": 0.0, "dropouti": 0.0, "dropouth": 0.1, "wdrop": 0.0,
}  # fmt: skip
PRESETS = {
    "default": {},
    "paper": {"name": "paper", **PAPER},
    "8m": {"name": "8m", **PAPER, "nhid": 990},
    # The authors' model with another recipe, for two CPU cores; and a larger one for a GPU.
    "best": {"name": "best", **RECIPE, "epochs": 10},
    "gpu": {"name": "gpu", **RECIPE, "nhid": 490, "batch_size": 256, "lr": 4e-3},
    # Defaults of the TCN authors' script for MNIST.
    "tcn": {
        "name": "tcn", "model": "tcn", "nhid": 25, "nlevels": 8, "ksize": 7, "dropout": 0.0, "dropouti": 0.0,
        "dropouth": 0.05, "wdrop": 0.0, "lr": 2e-3, "clip": 0.0, "epochs": 20, "when": [10],
    },
}  # fmt: skip


@dataclass(kw_only=True)
class ClassificationConfig(CoreConfig):
    """Settings that the image tasks share, with the authors' names and defaults."""

    mean: ClassVar[tuple[float, ...]]  # of each colour, in [0, 1]
    std: ClassVar[tuple[float, ...]]
    classes: ClassVar[int] = 10
    data_settings: ClassVar = ("permute", "permutation_seed")
    augmentation: ClassVar[AffineMaps]  # of --augment

    defaults: ClassVar = {
        "optim": "Adam", "lr": 4e-3, "clip": 0.5, "epochs": 200, "batch_size": 64, "eval_batch_size": 64,
        "when": [50, 75, 90], "anneal": 10, "nhid": 120, "nlevels": 11, "dilation": DILATION, "dropouth": 0.2,
        "wdrop": 0.1,
    }  # fmt: skip
    helps: ClassVar = {
        "batch_size": "images in a training batch",
        "eval_batch_size": "images evaluated at a time",
        "anneal": "no effect, as in the authors' script; see --when",
        "nhid": "hidden channels, not counting the ten output channels",
    }

    model: str = setting(
        TrellisNet.core_name,
        "core in front of the linear map",
        group="model",
        choices=(TrellisNet.core_name, TCN.core_name),
    )
    dropout: float = setting(0.1, "elementwise dropout of the logits", group="regularisation", rate="probability")
    dropouti: float = setting(0.2, "elementwise dropout of the pixels", group="regularisation", rate="probability")
    aux: float = setting(
        0.0, "no effect: the authors' script computes auxiliary outputs but never uses them",
        group="regularisation",
    )  # fmt: skip
    aux_freq: int = setting(10_000, "no effect, see --aux", group="regularisation")

    permute: bool = setting(True, "permute the pixels, in the same order for all images", group="data")
    permutation_seed: int = setting(0, "seed of the permutation, independent of --seed", group="data", at_least=0)
    augment: bool = setting(
        False, "transform training images at random, before the permutation, in ways that suit the task", group="data"
    )
    validation: bool = setting(True, "hold out the last 5,000 training images to choose the best epoch", group="data")

    def validate(self) -> None:
        super().validate()
        if self.eval_nlevels < 0 and not self.validation:
            raise UserError("--eval_nlevels auto: chooses on validation images; leave out --no-validation")

    def output_channels(self) -> int:
        """Return the number of classes, as the authors' code has it."""
        return self.classes

    def recipe(self) -> dict[str, Any]:
        return super().recipe() | {"augment": self.augment, "permute": self.permute}


def build_model(config: ClassificationConfig, channels: int, num_classes: int) -> TrellisClassifier:
    """Build the classifier of a configuration; as in the authors' code, TrellisNet has one output channel per class."""
    return TrellisClassifier(
        channels,
        num_classes,
        config.channels(),
        config.nlevels,
        output_size=num_classes if config.core.adds_output else None,
        input_dropout=config.dropouti,
        output_dropout=config.dropout,
        **config.core.options(config),
    )


class ClassificationProgram(Program):
    """Program of a classifier; `load(folder, download, validation)` returns an :class:`Images`."""

    build_model = staticmethod(build_model)

    def setup(
        self, config: ClassificationConfig, device: torch.device, ranks: Ranks | None = None
    ) -> tuple[Classification, Splits, Schedule, dict[str, Any]]:
        if device.type == "cpu":
            keep_freed_memory()  # saves about a third of a step; language models have larger products and gain nothing
        download = config.download and not config.data
        images = self.load(config.data_folder(), download=download, validation=config.validation)
        length, channels = images.train.pixels.shape[1:]
        order = permutation(length, config.permutation_seed) if config.permute else torch.arange(length)
        if config.augment and math.isqrt(length) ** 2 != length:
            raise UserError(f"--augment: needs square images, but these have {length} pixels; leave it out")
        model = build_model(config, channels, images.n_classes).to(device)
        if (seen := model.core.receptive_field or length) < length:  # None: unlimited
            warnings.warn(f"the model sees only the last {seen} of {length} pixels; raise --nlevels", stacklevel=2)
        # Copied to the device once: a copy per batch would synchronise with it.
        places = order.to(device)
        mean, std = (torch.tensor(values, device=device) for values in (config.mean, config.std))

        def prepare(pixels: Tensor) -> Tensor:
            return normalise(pixels[:, places], mean, std)

        task = Classification(
            model,
            batch_size=config.batch_size,
            eval_batch_size=config.eval_batch_size,
            prepare=prepare,
            seed=config.seed,
            augment=config.augmentation if config.augment else None,
            label_smoothing=config.label_smoothing,
            ranks=ranks,
        )
        parts = {"train": images.train, "valid": images.valid, "test": images.test}
        score_mc = functools.partial(task.evaluate_mc, passes=config.mc_dropout)
        parts = {name: part and tuple(tensor.to(device) for tensor in part) for name, part in parts.items()}
        splits = Splits(
            **parts,
            label=images.label,
            sha256=images.sha256,
            sizes=tuple(len(part[1]) if part else 0 for part in parts.values()),
            vocabulary_sha256=hashlib.sha256(order.numpy()).hexdigest(),
            extra_evaluations=config.depth_scores(task, {name: parts[name] for name in ("valid", "test")})
            | ({"test_mc": (score_mc, parts["test"])} if config.mc_dropout else {}),
            choices={"permutation": order.tolist()} if config.permute else {},
        )
        facts = {"training images": len(images.train.labels), "pixels": length}
        steps = 0 if config.eval else len(task.batches(splits.train))
        if steps:
            facts["steps an epoch"] = steps
        facts["order"] = f"permuted, seed {config.permutation_seed}" if config.permute else "row by row"
        if steps and config.augment:
            facts["augmentation"] = str(config.augmentation)
        return task, splits, make_schedule(config, lambda epoch: steps), facts
