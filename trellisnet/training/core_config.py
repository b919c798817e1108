"""The settings of the core, TrellisNet or another, which all tasks share."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import torch

from trellisnet import ops
from trellisnet.core import TrellisNet
from trellisnet.errors import UserError
from trellisnet.ops import gemm
from trellisnet.training.config import RunConfig
from trellisnet.training.cores import CORES, PARTICULAR, Core
from trellisnet.training.settings import properties_of, setting

MOST_LAYERS = 100_000  # far beyond any use; lists with an entry per layer stay small

# Settings that stand for arguments of the library under another name.
SETTINGS = {
    "weight_norm": "wnorm", "embedding_size": "emsize", "output_size": "nout", "hidden_size": "nhid",
    "kernel_size": "ksize", "kernel_groups": "mixed_group", "core": "model",
}  # fmt: skip


@dataclass(kw_only=True)
class CoreConfig(RunConfig):
    """Settings of a core, under the authors' names of TrellisNet where they have one.

    Another `model` has presets of its own: `--model rhn` means the preset `rhn`, and `--model rhn --preset small` the
    preset `rhn-small`.
    """

    model: str = setting(TrellisNet.core_name, "core between embedding and head", group="model", choices=tuple(CORES))
    mc_dropout: int = setting(
        0, "also score by the mean of N passes with dropout (Monte Carlo); 0: not", group="evaluation", at_least=0
    )
    nhid: int = setting(1000, "hidden channels without the output channels", group="model", at_least=1)
    nlevels: int = setting(58, "layers", group="model", at_least=1, at_most=MOST_LAYERS)
    ksize: int = setting(2, "kernel size", group="model", at_least=2)
    dilation: list[int] = setting([1], "dilations, cycled over the layers", group="model", at_least=1)
    wnorm: bool = setting(True, "weight normalisation", group="model")
    dropouth: float = setting(
        0.0, "hidden dropout, one mask per sequence for all layers", group="regularisation", rate="probability"
    )
    wdrop: float = setting(0.0, "DropConnect on both kernels", group="regularisation", rate="probability")
    temporalwdrop: bool = setting(True, "DropConnect on the older taps only", group="regularisation")
    activation: str = setting("lstm", "gates of a layer", group="model", choices=tuple(ops.ACTIVATIONS))
    mixed_group: int = setting(
        0, "groups of a mixed group convolution (Theorem 1); 0: a dense kernel", group="model", at_least=0
    )
    inject_every: int = setting(1, "inject the input every N layers", group="model", at_least=1)
    recompute: bool = setting(
        False, "compute layers again in the backward pass instead of keeping them: less memory",
        group="hardware", resumable=True,
    )  # fmt: skip
    recompute_every: int = setting(
        0, "with --recompute: keep every Nth layer; 0: the root of their number",
        group="hardware", resumable=True, at_least=0,
    )  # fmt: skip
    init_gain: float = setting(
        0.0, "draw kernels from N(0, G²/fan-in), forget gates start at bias 1; 0: N(0, 0.01²), as the authors",
        group="model", at_least=0,
    )  # fmt: skip
    gate_bias: float = setting(
        -2.0, "initial bias of a recurrent highway network's transform gates", group="settings of other cores"
    )

    @classmethod
    def preset_names(cls) -> list[str]:
        """What `--preset` may be: also the names that a model's presets have after its own."""
        short = [name.removeprefix(f"{values.get('model')}-") for name, values in cls.presets.items()]
        return list(dict.fromkeys([*cls.presets, *short]))

    @classmethod
    def preset_of(cls, given: dict[str, Any]) -> str:
        """The preset that given settings start from: one of the model's own.

        Raises:
            UserError: a preset of another model.
        """
        preset, model = given.get("preset", "default"), given.get("model", TrellisNet.core_name)
        if model == TrellisNet.core_name:
            return preset
        own = model if preset == "default" else f"{model}-{preset}"
        if own in cls.presets:
            return own
        if cls.presets.get(preset, {}).get("model") == model:
            return preset
        names = [name for name, values in cls.presets.items() if values.get("model") == model]
        known = f"has {', '.join(names)}" if names else f"has none in {cls.task}"
        raise UserError(f"--preset {preset}: is no preset of --model {model}, which {known}")

    @classmethod
    def is_listed(cls, name: str) -> bool:
        """Whether `--help` lists a setting: not if only cores read it that the task does not offer."""
        cores = (CORES[core] for core in properties_of(cls, "model").choices)
        is_read = name not in PARTICULAR or any(name in core.reads for core in cores)
        return is_read and super().is_listed(name)

    def validate(self) -> None:
        super().validate()
        preset = self.presets[self.preset]
        if self.model != preset.get("model", TrellisNet.core_name):
            raise UserError(f"--model {self.model}: --preset {self.preset} is of {preset['model']}; leave one out")
        for field in dataclasses.fields(self):
            unread = field.name in PARTICULAR - self.core.reads
            if unread and getattr(self, field.name) != self.preset_value(field.name):
                raise UserError(f"--{field.name}: --model {self.model} has nothing of the kind; leave it out")
        self.core.check(self)

    def settings_of(self, arguments: dict[str, Any]) -> dict[str, Any]:
        found = super().settings_of(arguments)
        if "hidden_size" in found and self.core.adds_output:  # all channels, of which `nhid` leaves out the output's
            found["hidden_size"] -= found.get("output_size", self.channels() - self.nhid)
            if found["hidden_size"] == self.nhid:
                del found["hidden_size"]
        if "core" in found:
            found["core"] = found["core"].core_name
        return {SETTINGS.get(name, name): value for name, value in found.items()}

    def notices(self, device: torch.device) -> list[str]:
        notices = super().notices(device)
        if self.precision == "bf16" and device.type == "cpu" and not gemm.usable("onednn", device, torch.bfloat16):
            notices.append("this CPU has no bfloat16 instructions: --precision fp32 is several times faster on it")
        return notices + self.core.notices(self, device)

    def no_graph(self, device: torch.device) -> str:
        return super().no_graph(device) or self.core.no_graph()

    @property
    def core(self) -> Core:
        """The core that `model` names."""
        return CORES[self.model]

    def output_channels(self) -> int:
        """Channels that the head reads."""
        raise NotImplementedError

    def channels(self) -> int:
        """H, the hidden channels with those of the output; of other cores than TrellisNet all of them are `nhid`."""
        return self.nhid + (self.output_channels() if self.core.adds_output else 0)

    def chosen(self, device: torch.device) -> Self:
        """These settings with backend, products and gates decided: once, for a continued run must compute the same.

        Raises:
            UserError: what was asked for cannot run here.
        """
        return dataclasses.replace(super().chosen(device), **self.core.choices(self, device))
