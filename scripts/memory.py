"""Train a network on a synthetic memory task of Bai, Kolter & Koltun (2018, arXiv:1803.01271, section 4).

    python scripts/memory.py                                  TrellisNet on the copy task, T = 400
    python scripts/memory.py --preset adding --model tcn      a generic TCN on the adding problem, T = 600

*Copy*: ten random digits, T − 1 blanks, then eleven markers; while it reads the last ten markers, the network must
output the ten digits. *Adding*: T pairs of a random number and a mark, which is set in two of them; the network must
output the sum of the two marked numbers. Examples are generated, the same for every network; the networks have the same
number of parameters within two per cent. The flags of the training programs work here too: run folders, --resume,
--metrics.

Letters: N examples in a batch, L steps of an example, T as above.
"""

import dataclasses
import functools
import hashlib
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main takes signals: no traceback from an import

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trellisnet.baselines import AWDLSTM, RHN, TCN
from trellisnet.core import TrellisNet
from trellisnet.errors import UserError
from trellisnet.models import TrellisClassifier
from trellisnet.training import cli
from trellisnet.training.allocator import keep_freed_memory
from trellisnet.training.core_config import CoreConfig
from trellisnet.training.distributed import Ranks
from trellisnet.training.optim import Schedule, make_schedule
from trellisnet.training.settings import setting
from trellisnet.training.tasks import Classification, Splits, evaluating
from trellisnet.training.tasks.base import mean, tracked

DIGITS, BLANK, MARKER = 10, 0, 9  # number of digits to remember, each from 1 to 8; the other two symbols
DATA_SEED = 2018  # of the examples, the same for every --seed


# -- problems ----------------------------------------------------------------------------------------------------------


def copy_examples(n: int, length: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Generate examples of the copy task.

    Args:
        n: number of examples.
        length: T; a digit must be output T + 10 steps after it was read.
        rng: draws the digits.

    Returns:
        symbols, uint8 (n, T + 20, 1), and targets, uint8 (n, T + 20), blank except for the last ten.
    """
    digits = torch.from_numpy(rng.integers(1, MARKER, (n, DIGITS), dtype=np.uint8))
    x = torch.full((n, length + 2 * DIGITS), BLANK, dtype=torch.uint8)
    y = x.clone()
    x[:, :DIGITS], x[:, length + DIGITS - 1 :], y[:, -DIGITS:] = digits, MARKER, digits
    return x.unsqueeze(2), y


def adding_examples(n: int, length: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Generate examples of the adding problem.

    Args:
        n: number of examples.
        length: T, the steps of an example.
        rng: draws numbers and marks.

    Returns:
        numbers in [0, 1) and their marks, float32 (n, T, 2), and the sums of the two marked numbers, float32 (n,).
    """
    x = torch.zeros(n, length, 2)
    x[:, :, 0] = torch.from_numpy(rng.random((n, length), dtype=np.float32))
    first, gap = rng.integers(0, length, n), rng.integers(1, length, n)  # two different places, all pairs alike
    for place in (first, (first + gap) % length):
        x[torch.arange(n), torch.from_numpy(place), 1] = 1.0
    return x, (x[:, :, 0] * x[:, :, 1]).sum(1)


class Problem(NamedTuple):
    """A problem: default T and number of training examples, input and output channels, generator of examples."""

    length: int
    examples: int
    input_size: int
    output_size: int
    generate: Callable[[int, int, np.random.Generator], tuple[Tensor, Tensor]]


PROBLEMS = {
    "copy": Problem(400, 10_000, 1, MARKER + 1, copy_examples),
    "adding": Problem(600, 50_000, 2, 1, adding_examples),
}
HELD_OUT = 1_000  # examples for validation, and as many for test


def chance(problem: str, length: int) -> float:
    """Loss of a network without memory, which outputs any digit with equal probability, or the mean sum."""
    return DIGITS * math.log(MARKER - 1) / (length + 2 * DIGITS) if problem == "copy" else 1 / 6


# -- settings ----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Config(CoreConfig):
    """Train a network on the copy task or the adding problem."""

    task: ClassVar[str] = "memory"
    presets: ClassVar = {
        "default": {},
        "copy": {"lr": 0.02},  # 0.004 copies as surely, but ten epochs end at ten times the loss
        "adding": {
            "problem": "adding", "name": "adding", "nlevels": 5, "nhid": 66, "ksize": 4, "lr": 0.01,
            "epochs": 24, "dilation": [4**i for i in range(5)],
        },
        "awd-lstm": {"model": "awd-lstm", "name": "copy-lstm", "nlevels": 1, "nhid": 59},
        "awd-lstm-adding": {
            "model": "awd-lstm", "problem": "adding", "name": "adding-lstm", "nlevels": 1, "nhid": 132,
        },
        "tcn": {"model": "tcn", "name": "copy-tcn", "nlevels": 8, "ksize": 8, "nhid": 11},
        "tcn-adding": {
            "model": "tcn", "problem": "adding", "name": "adding-tcn", "nlevels": 8, "ksize": 7, "nhid": 26,
        },
        "rhn": {"model": "rhn", "name": "copy-rhn", "nlevels": 3, "nhid": 49, "length": 100},
        "rhn-adding": {
            "model": "rhn", "problem": "adding", "name": "adding-rhn", "nlevels": 3, "nhid": 109, "length": 100,
        },
    }  # fmt: skip

    # The digits lie 410 steps back, two strides of 205; one layer reads them first. Eleven layers of stride 41, which
    # reach as far with as many parameters, are still at 87 % after the same ten epochs.
    defaults: ClassVar = {
        "name": "copy", "nhid": 42, "nlevels": 3, "dilation": [205], "init_gain": 2.0, "optim": "Adam", "lr": 0.004,
        "clip": 1.0, "schedule": "onecycle", "epochs": 10, "batch_size": 32, "eval_batch_size": 200,
    }  # fmt: skip
    helps: ClassVar = {
        "data": "examples are always generated; 'synthetic' says so",
        "nhid": "hidden channels",
        "batch_size": "examples in a training batch",
        "eval_batch_size": "examples evaluated at a time",
        "anneal": "divide the learning rate by 4 on a plateau, with a patience of N epochs; 0: never",
    }

    problem: str = setting("copy", "task to learn", group="data", choices=tuple(PROBLEMS))
    length: int = setting(0, "length T of the problem; 0: 400 for copy, 600 for adding", group="data", at_least=0)
    examples: int = setting(0, "training examples; 0: 10,000 for copy, 50,000 for adding", group="data", at_least=0)
    model: str = setting(
        TrellisNet.core_name, "core in front of the linear map", group="model",
        choices=tuple(core.core_name for core in (TrellisNet, AWDLSTM, TCN, RHN)),
    )  # fmt: skip

    @classmethod
    def program(cls) -> str:
        return "scripts/memory.py"

    def size(self) -> int:
        """T."""
        return self.length or PROBLEMS[self.problem].length

    def recipe(self) -> dict[str, Any]:
        with torch.device("meta"):
            seen = getattr(build_model(self).core, "receptive_field", None)
        chances = {"chance": chance(self.problem, self.size()), "receptive_field": seen}
        return super().recipe() | {"problem": self.problem, "length": self.size(), **chances}

    def channels(self) -> int:
        """H: all channels are the output."""
        return self.nhid

    def validate(self) -> None:
        super().validate()
        if self.data not in ("", "synthetic"):
            raise UserError(f"--data {self.data}: expected synthetic, or nothing: examples are always generated")
        for name in ("label_smoothing", "mc_dropout"):
            if getattr(self, name):
                raise UserError(f"--{name}: has no effect on these problems; leave it out")
        if self.problem == "adding" and self.size() < 2:
            raise UserError(f"--length {self.length}: two numbers are added; expected at least 2")


# -- model and task ----------------------------------------------------------------------------------------------------


class Tagger(TrellisClassifier):
    """Classifier of every step instead of the whole sequence; same arguments as its base class."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits, float32 (N, L, num_classes), of x (N, L, input_size)."""
        y = self.core(x).output
        with torch.autocast(x.device.type, enabled=False):
            return self.head(y.to(self.head.weight.dtype))


class MemoryTask(Classification):
    """A task of the engine with the batches and arguments of its base class; a subclass defines loss and score."""

    def sums(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and score of a batch, each summed over its examples."""
        raise NotImplementedError

    def size(self, batch: tuple[Tensor, Tensor]) -> int:
        """Number of examples in a batch."""
        return len(batch[1])

    def loss(self, x: Tensor, y: Tensor, state: None = None) -> tuple[dict[str, Tensor], None]:
        """Mean loss and score of a batch; no state is carried."""
        loss, score = (part / len(y) for part in self.sums(x, y))
        return {"loss": loss, "raw": loss, self.score_name: score.detach()}, None

    @torch.no_grad()
    def evaluate(
        self, data: tuple[Tensor, Tensor], *, max_tokens: int | None = None, progress: Any = None
    ) -> dict[str, Any]:
        """Mean loss and score of all examples in evaluation mode."""
        starts, totals = self._scored(len(data[1]), max_tokens), torch.zeros(3, dtype=torch.float64)
        with evaluating(self.model):
            for start in tracked(starts, progress):
                x, y = (part[start : start + self.eval_batch_size] for part in data)
                sums = self.sums(self.prepare(x), y)
                totals += torch.stack([*(part.double().cpu() for part in sums), torch.tensor(float(len(y)))])
        loss, score, examples = self.ranks.sum(*totals.tolist())
        return {"loss": mean(loss, examples), self.score_name: mean(score, examples), "examples": int(examples)}

    def training_score(self, means: dict[str, float]) -> float:
        """Score during training."""
        return means[self.score_name]

    def scores(self, result: dict[str, Any], split: str) -> dict[str, float]:
        """Score of a result."""
        return {self.score_name: result[self.score_name]}

    @staticmethod
    def is_better(result: dict[str, Any], best: dict[str, Any]) -> bool:
        """Return whether a validation result beats the best one so far."""
        return result["loss"] < best["loss"]


class Copying(MemoryTask):
    """Cross-entropy of every step's symbol, in nats per step; accuracy of the ten digits."""

    score_name, digits = "accuracy", 4
    measured = ("loss", "accuracy")

    def sums(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits, y = self.model(x), y.long()  # (N, L, symbols)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / y.size(1)
        right = (logits[:, -DIGITS:].argmax(2) == y[:, -DIGITS:]).sum()
        return loss, right / DIGITS


class Adding(MemoryTask):
    """Squared error of the sum, which is also the score."""

    score_name, digits = "mse", 6
    measured = ("loss", "mse")

    def sums(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        error = (self.model(x).logits.flatten() - y).square().sum()
        return error, error


TASKS = {"copy": Copying, "adding": Adding}


def build_model(config: Config) -> TrellisClassifier:
    """The network of a configuration."""
    problem = PROBLEMS[config.problem]
    network = Tagger if config.problem == "copy" else TrellisClassifier
    sizes = problem.input_size, problem.output_size, config.channels(), config.nlevels
    return network(*sizes, **config.core.options(config))


def setup(config: Config, device: torch.device, ranks: Ranks) -> tuple[MemoryTask, Splits, Schedule, dict[str, Any]]:
    """Task, data, schedule and facts of a run, for :func:`trellisnet.training.cli.main`."""
    if device.type == "cpu":
        keep_freed_memory()
    problem = PROBLEMS[config.problem]
    length, examples = config.size(), config.examples or problem.examples
    rng = np.random.default_rng(DATA_SEED)
    data = [problem.generate(n, length, rng) for n in (examples, HELD_OUT, HELD_OUT)]
    model = build_model(config).to(device)
    seen = getattr(model.core, "receptive_field", None) or math.inf
    needed = length + DIGITS + 1 if config.problem == "copy" else length
    notice = f"the model sees {seen} steps, too few to reach what it must remember, {needed - 1} steps back"
    task = TASKS[config.problem](
        model,
        batch_size=config.batch_size,
        eval_batch_size=config.eval_batch_size,
        prepare=lambda x: x.float(),
        seed=config.seed,
        ranks=ranks,
    )
    digest = hashlib.sha256()
    for part in (part for split in data for part in split):
        digest.update(part.numpy())
    splits = Splits(
        *(tuple(part.to(device) for part in split) for split in data),
        label=f"{config.problem}, T = {length}",
        sha256=digest.hexdigest(),
        sizes=(examples, HELD_OUT, HELD_OUT),
        notices=(notice,) if seen < needed else (),
    )
    held_out = {split: getattr(splits, split) for split in ("valid", "test")}
    splits = dataclasses.replace(splits, extra_evaluations=config.depth_scores(task, held_out))
    facts = {
        "training examples": examples,
        "loss by chance": f"{chance(config.problem, length):.4f}",
    }
    steps = 0 if config.eval else len(task.batches(splits.train))
    return task, splits, make_schedule(config, lambda epoch: steps, anneal=config.anneal), facts


main = functools.partial(cli.main, Config, setup)

if __name__ == "__main__":
    sys.exit(main())
