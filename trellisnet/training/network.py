"""The settings of the trellis itself, and of the networks that can stand in its place, which all tasks share."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Self

import torch

from trellisnet import ops
from trellisnet.baselines import AWDLSTM, RHN, TCN, SparseStack
from trellisnet.errors import UserError
from trellisnet.ops import gemm
from trellisnet.training.config import RunConfig
from trellisnet.training.settings import setting

MEASURED = 100  # channels from which on the route of the products is measured
ROWS = 512  # of the products that are measured
COMPUTE = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
MOST_LAYERS = 100_000  # far beyond any use; lists with an entry per layer stay small
TRELLISNET = "trellisnet"
MODELS = (TRELLISNET, *(network.model_name for network in (AWDLSTM, TCN, RHN, SparseStack)))

# Settings that stand for arguments of the library under another name.
SETTINGS = {
    "weight_norm": "wnorm", "embedding_size": "emsize", "output_size": "nout", "hidden_size": "nhid",
    "kernel_size": "ksize", "kernel_groups": "mixed_group", "network": "model",
}  # fmt: skip
# Settings that a network does not read. With another value than the preset's they would be ignored in silence.
_TRELLIS = frozenset("dilation wnorm temporalwdrop activation mixed_group inject_every recompute aux".split())
_SPARSE = frozenset("sparse_mode sparse_fract".split())
UNREAD = {
    TRELLISNET: _SPARSE | {"gate_bias"},
    "awd-lstm": _TRELLIS | _SPARSE | {"ksize", "gate_bias"},
    "tcn": _TRELLIS | _SPARSE | {"wdrop", "gate_bias"},
    "rhn": _TRELLIS | _SPARSE | {"ksize", "wdrop"},
    "sparse-lstm": _TRELLIS | {"ksize", "gate_bias"},
}


@dataclass(kw_only=True)
class NetworkConfig(RunConfig):
    """Settings of a network, under the authors' names of TrellisNet where they have one.

    Another `model` has presets of its own: `--model rhn` means the preset `rhn`, and `--model rhn --preset small` the
    preset `rhn-small`.
    """

    model: str = setting(TRELLISNET, "core between embedding and head", group="model", choices=MODELS)
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
        preset, model = given.get("preset", "default"), given.get("model", TRELLISNET)
        if model == TRELLISNET:
            return preset
        own = model if preset == "default" else f"{model}-{preset}"
        if own in cls.presets:
            return own
        if cls.presets.get(preset, {}).get("model") == model:
            return preset
        names = [name for name, values in cls.presets.items() if values.get("model") == model]
        known = f"has {', '.join(names)}" if names else f"has none in {cls.task}"
        raise UserError(f"--preset {preset}: is no preset of --model {model}, which {known}")

    def validate(self) -> None:
        super().validate()
        preset = self.presets[self.preset]
        if self.model != preset.get("model", TRELLISNET):
            raise UserError(f"--model {self.model}: --preset {self.preset} is of {preset['model']}; leave one out")
        for field in dataclasses.fields(self):
            if field.name in UNREAD[self.model] and getattr(self, field.name) != self.preset_value(field.name):
                raise UserError(f"--{field.name}: --model {self.model} has nothing of the kind; leave it out")
        if self.model != TRELLISNET and self.backend not in ("auto", "reference"):
            raise UserError(f"--backend {self.backend}: is of TrellisNet; --model {self.model} needs auto or reference")
        if self.model == TCN.model_name and self.nlevels > 30:
            raise UserError(f"--nlevels {self.nlevels}: a TCN's dilation doubles with every block; 30 are the most")

    def settings_of(self, arguments: dict[str, Any]) -> dict[str, Any]:
        found = super().settings_of(arguments)
        if "hidden_size" in found and self.model == TRELLISNET:  # all channels, of which `nhid` leaves out the output's
            own = self.channels() - self.nhid
            found["hidden_size"] -= found.get("output_size", own)
            if found["hidden_size"] == self.nhid:
                del found["hidden_size"]
        if "network" in found:
            found["network"] = getattr(found["network"], "model_name", TRELLISNET)
        return {SETTINGS.get(name, name): value for name, value in found.items()}

    def core_options(self) -> dict[str, Any]:
        """The class of the core, `network`, and its keywords.

        Raises:
            UserError: the channels do not make equal groups, or the input does not reach the output through them.
        """
        if self.model != TRELLISNET:
            return {"hidden_dropout": self.dropouth, **self._baseline_options()}
        hidden_size = self.channels()
        if self.mixed_group and hidden_size % self.mixed_group:
            more = -hidden_size % self.mixed_group
            raise UserError(
                f"--mixed_group {self.mixed_group}: does not divide the {hidden_size} channels, the output's included; "
                f"pass --nhid {self.nhid + more}"
            )
        climbs = self.nhid // (hidden_size // self.mixed_group) if self.mixed_group else 0
        if climbs >= self.nlevels:
            raise UserError(
                f"--mixed_group {self.mixed_group}: the input climbs a group a layer and would not reach the output; "
                f"pass --nlevels {climbs + 1} or more"
            )
        return {
            "kernel_size": self.ksize,
            "dilation": self.dilation,
            "weight_norm": self.wnorm,
            "hidden_dropout": self.dropouth,
            "weight_dropout": self.wdrop,
            "temporal_weight_dropout": self.temporalwdrop,
            "activation": self.activation,
            "kernel_groups": self.mixed_group or None,
            "inject_every": self.inject_every,
            "recompute": self.recompute,
            "recompute_every": self.recompute_every or None,
            "backend": self.backend,
            "gemm": self.gemm,
            "gates": self.gates,
        }

    def _spec(self) -> ops.TrellisSpec:
        groups, activation = self.mixed_group or None, ops.find_activation(self.activation)
        return ops.TrellisSpec(self.nlevels, self.channels(), activation, kernel_groups=groups)

    def _gates(self, backend: str, device: torch.device) -> str:
        """What computes the gates. A run that goes on elsewhere may have to take others."""
        settings = (device, COMPUTE[self.precision], self.activation)
        if backend == "triton":
            try:
                return ops.resolve_gates("triton", *settings)
            except ValueError as e:
                raise ValueError(f"backend: {str(e).removeprefix('gates: ').partition(';')[0]}") from e
        try:
            return ops.resolve_gates(self.gates, *settings)
        except ValueError:
            if not self.is_continued():
                raise
            return ops.resolve_gates("auto", *settings)

    def _baseline_options(self) -> dict[str, Any]:
        match self.model:
            case "awd-lstm":
                return {"network": AWDLSTM, "weight_dropout": self.wdrop}
            case "tcn":
                network = functools.partial(TCN, input_dropout=self.elementwise_input_dropout())
                return {"network": network, "kernel_size": self.ksize}
            case "rhn":
                return {"network": RHN, "gate_bias": self.gate_bias}
        return {
            "network": SparseStack, "weight_dropout": self.wdrop, "mode": self.sparse_mode,
            "fraction": self.sparse_fract,
        }  # fmt: skip

    def elementwise_input_dropout(self) -> float:
        """The rate of dropping single numbers of the core's input, for a core that does it itself."""
        return 0.0

    def notices(self, device: torch.device) -> list[str]:
        notices = super().notices(device)
        if self.precision == "bf16" and device.type == "cpu" and not gemm.usable("onednn", device, torch.bfloat16):
            notices.append("this CPU has no bfloat16 instructions: --precision fp32 is several times faster on it")
        if self.model != TRELLISNET:
            return notices
        if self.backend == "reference":
            reason = ops.not_fused(self._spec())
            notices += [f"backend reference, slower than fused: {reason}"] if reason else []
        elif self.gates == "eager":
            reason = ops.slow_gates(device, COMPUTE[self.precision], self.activation)
            notices += [f"gates eager, {reason}"] if reason else []
        return notices

    def no_graph(self, device: torch.device) -> str:
        reason = "" if self.model == TRELLISNET else f"--model {self.model} is not recorded"
        return super().no_graph(device) or reason

    def channels(self) -> int:
        """H, the hidden channels with those of the output."""
        raise NotImplementedError

    def chosen(self, device: torch.device) -> Self:
        """These settings with backend, products and gates decided: once, for a continued run must compute the same.

        Raises:
            UserError: what was asked for cannot run here.
        """
        config, dtype = super().chosen(device), COMPUTE[self.precision]
        if self.model != TRELLISNET:  # torch's own operators
            return dataclasses.replace(config, backend="reference")
        try:
            backend = ops.resolve(self._spec(), ops.Execution(self.backend, recompute=self.recompute))
            if backend == "reference":
                return dataclasses.replace(config, backend=backend)
            # A run that goes on elsewhere may have to multiply in another way.
            moved = self.is_continued() and self.gemm != "auto" and not gemm.usable(self.gemm, device, dtype)
            wanted = "auto" if moved else self.gemm
            route = next(name for name, p in gemm.ROUTES.items() if p is gemm.resolve(wanted, device, dtype))
            gates = self._gates(backend, device)
        except ValueError as e:
            raise UserError(f"--{e}") from e
        # Small products take no time by any route, and are not worth results that depend on a stopwatch.
        if wanted == "auto" and self.channels() >= MEASURED and not self.deterministic:
            inputs, outputs = self.ksize * self.channels(), self._spec().activation.gates * self.channels()
            route = gemm.fastest(device, dtype, ROWS, inputs, outputs)
        return dataclasses.replace(config, backend=backend, gemm=route, gates=gates)
