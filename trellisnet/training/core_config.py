"""Settings of the core, TrellisNet or another, that all tasks share."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import torch

from trellisnet import ops
from trellisnet.core import TrellisNet
from trellisnet.equilibrium import WAYS
from trellisnet.errors import UserError
from trellisnet.ops import gemm
from trellisnet.training import depth, scoring
from trellisnet.training.config import RunConfig
from trellisnet.training.cores import CORES, PARTICULAR, Core
from trellisnet.training.scoring import Scores
from trellisnet.training.settings import properties_of, setting
from trellisnet.training.tasks import Task

MOST_LAYERS = 100_000  # far beyond any use; lists with an entry per layer stay small

# Arguments of the library → settings, where the names differ.
SETTINGS = {
    "weight_norm": "wnorm", "embedding_size": "emsize", "output_size": "nout", "hidden_size": "nhid",
    "kernel_size": "ksize", "kernel_groups": "mixed_group", "core": "model",
}  # fmt: skip


@dataclass(kw_only=True)
class CoreConfig(RunConfig):
    """Settings of a core, under the authors' names where they have one.

    Cores other than TrellisNet have their own presets: `--model rhn` starts from the preset `rhn`, and `--model rhn
    --preset small` from `rhn-small`.
    """

    model: str = setting(TrellisNet.core_name, "core between embedding and head", group="model", choices=tuple(CORES))
    mc_dropout: int = setting(
        0,
        "also score with probabilities averaged over N passes with dropout (Monte Carlo); 0: off",
        group="evaluation",
        at_least=0,
    )
    nhid: int = setting(1000, "hidden channels, not counting the output channels", group="model", at_least=1)
    nlevels: int = setting(58, "layers", group="model", at_least=1, at_most=MOST_LAYERS)
    grow: list[str] = setting(
        [], "begin with fewer layers, in stages of LAYERS for EPOCHS each, before training with --nlevels; none: off",
        group="optimisation", metavar="LAYERS:EPOCHS", special=[], word="none",
    )  # fmt: skip
    random_depth: int = setting(
        0, "draw the number of layers for every update from up to four values between N and --nlevels; 0: off",
        group="optimisation", at_least=0,
    )  # fmt: skip
    eval_depths: list[int] = setting(
        [], "also score with these numbers of layers; none: off", group="evaluation", resumable=True,
        at_least=1, at_most=MOST_LAYERS, special=[], word="none",
    )  # fmt: skip
    eval_nlevels: int = setting(
        0, "number of layers for all final scores; auto: the best of --eval_depths and --nlevels on the validation "
        "data; 0: --nlevels",
        group="evaluation", resumable=True, at_least=0, at_most=MOST_LAYERS, special=-1, word="auto",
    )  # fmt: skip
    ksize: int = setting(2, "kernel size", group="model", at_least=2)
    dilation: list[int] = setting([1], "dilations, cycled over the layers", group="model", at_least=1)
    wnorm: bool = setting(True, "weight normalisation", group="model")
    dropouth: float = setting(
        0.0,
        "hidden dropout; in TrellisNet one mask per sequence, for all layers",
        group="regularisation",
        rate="probability",
    )
    wdrop: float = setting(0.0, "DropConnect on both kernels", group="regularisation", rate="probability")
    temporalwdrop: bool = setting(True, "apply DropConnect to the older taps only", group="regularisation")
    activation: str = setting("lstm", "activation of a layer", group="model", choices=tuple(ops.ACTIVATIONS))
    mixed_group: int = setting(
        0, "groups of a mixed group convolution (Theorem 1); 0: dense kernel", group="model", at_least=0
    )
    inject_every: int = setting(1, "inject the input every N layers", group="model", at_least=1)
    recompute: bool = setting(
        False, "save memory: recompute layers in the backward pass instead of storing them",
        group="hardware", resumable=True,
    )  # fmt: skip
    recompute_every: int = setting(
        0, "with --recompute, store every Nth layer; 0: about the square root of --nlevels",
        group="hardware", resumable=True, at_least=0,
    )  # fmt: skip
    init_gain: float = setting(
        0.0, "draw kernels from N(0, G²/fan-in) and start forget gates at bias 1; 0: N(0, 0.01²), as the authors do",
        group="model", at_least=0,
    )  # fmt: skip
    equilibrium: bool = setting(
        False, "solve for the output of infinitely many layers instead of computing --nlevels of them", group="model"
    )
    solver: str = setting(
        "stepwise", "solver of --equilibrium: one time step after another, or all at once", group="model", choices=WAYS
    )
    tolerance: float = setting(1e-3, "relative residual at which --equilibrium is solved", group="model", at_least=0)
    max_evaluations: int = setting(
        60, "limit on layer evaluations with --equilibrium; per time step with stepwise", group="model", at_least=1
    )
    phantom: int = setting(
        0, "backpropagate through the last N evaluations of --equilibrium; 0: implicit gradient",
        group="model", at_least=0,
    )  # fmt: skip
    gate_bias: float = setting(
        -2.0, "initial bias of a recurrent highway network's transform gates", group="settings of other cores"
    )
    rhn_masks: str = setting(
        "shared", "dropout masks of a recurrent highway network's two transforms, on input and state",
        group="settings of other cores", choices=("shared", "separate"),
    )  # fmt: skip

    @classmethod
    def preset_names(cls) -> list[str]:
        """Return the values that `--preset` takes, including those that follow a core's name, as in `rhn-small`."""
        short = [name.removeprefix(f"{values.get('model')}-") for name, values in cls.presets.items()]
        return list(dict.fromkeys([*cls.presets, *short]))

    @classmethod
    def preset_of(cls, explicit: dict[str, Any]) -> str:
        """Return the name of the preset that these explicit settings start from, one of the core's own.

        Raises:
            UserError: a preset of another core.
        """
        preset, model = explicit.get("preset", "default"), explicit.get("model")
        own = model if preset == "default" else f"{model}-{preset}"
        if own in cls.presets:
            return own
        if model in (None, cls._model_of(preset)):
            return preset
        names = [name for name in cls.presets if cls._model_of(name) == model]
        expected = f"expected {', '.join(names)}" if names else f"it has none in {cls.task}"
        raise UserError(f"--preset {preset}: not a preset of --model {model}; {expected}")

    @classmethod
    def _model_of(cls, preset: str) -> str:
        return cls.presets.get(preset, {}).get("model", TrellisNet.core_name)

    @classmethod
    def is_listed(cls, name: str) -> bool:
        """Return whether `--help` lists a setting. It does not if no core of this task reads it."""
        cores = (CORES[core] for core in properties_of(cls, "model").choices)
        is_read = name not in PARTICULAR or any(name in core.reads for core in cores)
        return is_read and super().is_listed(name)

    def validate(self) -> None:
        super().validate()
        if self.model != (owner := self._model_of(self.preset)):
            raise UserError(f"--model {self.model}: --preset {self.preset} belongs to {owner}; leave one out")
        for field in dataclasses.fields(self):
            unread = field.name in PARTICULAR - self.core.reads
            if unread and getattr(self, field.name) != self.preset_value(field.name):
                raise UserError(f"--{field.name}: has no effect on --model {self.model}; leave it out")
        self._check_depths()
        self.core.check(self)

    def _check_depths(self) -> None:
        depth.read_stages(self.grow, self.nlevels, self.epochs)
        if self.random_depth and self.random_depth >= self.nlevels:
            raise UserError(
                f"--random_depth {self.random_depth}: expected less than --nlevels {self.nlevels}; lower it or raise "
                "--nlevels (to score at another depth, pass --eval_nlevels)"
            )
        if self.random_depth and self.grow:
            raise UserError("--grow and --random_depth exclude each other: leave one of the two out")
        if self.eval_nlevels < 0 and not self.eval_depths:
            raise UserError(
                "--eval_nlevels auto: has no depths to choose from; name some with --eval_depths, or pass 0"
            )

    def depths(self) -> list[int]:
        """Return the numbers of layers with which a run trains, in increasing order."""
        if self.random_depth:
            return depth.choices(self.random_depth, self.nlevels)
        return sorted({self.nlevels, *(s.layers for s in depth.read_stages(self.grow, self.nlevels, self.epochs))})

    def depth(self, epoch: int, update: int | None = None) -> int | None:
        if self.random_depth and update is not None:
            return depth.draw(self.depths(), self.seed, update)
        if not self.grow and not self.random_depth:
            return None
        return depth.depth_of(depth.read_stages(self.grow, self.nlevels, self.epochs), epoch, self.nlevels)

    def scoring_depths(self) -> list[int]:
        if self.eval_nlevels < 0:
            return sorted({*self.eval_depths, self.nlevels})
        if self.eval_nlevels:
            return [self.eval_nlevels]
        return [self.nlevels] if self.grow or self.random_depth or self.eval_depths else []

    def depth_scores(self, task: Task, splits: dict[str, Any]) -> Scores:
        """Return the scores of `--eval_depths` for every split in `splits` that has data."""
        there = {split: data for split, data in splits.items() if data is not None}
        return scoring.depth_scores(task, sorted(set(self.eval_depths)), there) if self.eval_depths else {}

    def recipe(self) -> dict[str, Any]:
        return super().recipe() | {"grow": self.grow, "random_depth": self.random_depth}

    def settings_of(self, arguments: dict[str, Any]) -> dict[str, Any]:
        settings = super().settings_of(arguments)
        if "hidden_size" in settings and self.core.adds_output:  # all channels; `nhid` leaves out those of the output
            settings["hidden_size"] -= settings.get("output_size", self.channels() - self.nhid)
            if settings["hidden_size"] == self.nhid:
                del settings["hidden_size"]
        if "core" in settings:
            settings["core"] = settings["core"].core_name
        return {SETTINGS.get(name, name): value for name, value in settings.items()}

    def emulates_bf16(self, device: torch.device) -> bool:
        """Return whether this device lacks the bfloat16 instructions that `precision` asks for."""
        return self.precision == "bf16" and device.type == "cpu" and not gemm.usable("onednn", device, torch.bfloat16)

    def notices(self, device: torch.device) -> list[str]:
        notices = super().notices(device)
        if self.emulates_bf16(device):
            notices.append("this CPU has no bfloat16 instructions; --precision fp32 is several times faster on it")
        return notices + self.core.notices(self, device)

    def no_graph(self, device: torch.device) -> str:
        stops = "--equilibrium stops by its residuals" * self.equilibrium
        return super().no_graph(device) or self.core.no_graph() or stops

    @property
    def core(self) -> Core:
        """The entry of the core that `model` names."""
        return CORES[self.model]

    def output_channels(self) -> int:
        """Return the number of channels that the head reads."""
        raise NotImplementedError

    def channels(self) -> int:
        """Return H, all hidden channels: for a TrellisNet `nhid` and the output channels, for other cores `nhid`."""
        return self.nhid + (self.output_channels() if self.core.adds_output else 0)

    def resolved(self, device: torch.device) -> Self:
        """Return a copy in which backend, products and gates are chosen too; a resumed run keeps these choices.

        Raises:
            UserError: the settings request something that cannot run here.
        """
        return dataclasses.replace(super().resolved(device), **self.core.resolve(self, device))
