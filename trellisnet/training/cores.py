"""Registry of cores for `--model`: the settings that each reads and refuses, and how models with it are built."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trellisnet import ops
from trellisnet.baselines import AWDLSTM, RHN, TCN, SparseStack, rhn, tcn
from trellisnet.core import TrellisNet
from trellisnet.equilibrium import EquilibriumTrellisNet
from trellisnet.errors import UserError, counted
from trellisnet.ops import gemm
from trellisnet.training.hardware import HardwareConfig

if TYPE_CHECKING:
    from trellisnet.training.core_config import CoreConfig
    from trellisnet.training.language_model import LanguageModelConfig

MEASURED = 100  # channels from which `gemm` auto is decided by a measurement
ROWS = 512  # rows of the products in that measurement
SOLVING = ("solver", "tolerance", "max_evaluations", "phantom")  # settings of --equilibrium
LAYERED = ("recompute", "grow", "random_depth", "eval_depths", "eval_nlevels", "early_exit")
COMPUTE = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


def resolve_execution(
    config: HardwareConfig, spec: ops.TrellisSpec, device: torch.device, *, recompute: bool = False
) -> dict[str, str]:
    """Choose `backend`, `gemm` and `gates` for a TrellisNet all of whose channels `spec` outputs.

    A run that is resumed on another machine takes what this one has.

    Raises:
        UserError: the settings request something that cannot run here.
    """
    dtype = COMPUTE[config.precision]
    try:
        backend = ops.resolve(spec, ops.Execution(config.backend, recompute=recompute))
        if backend == "reference":
            return {"backend": backend}
        moved = config.is_continued() and config.gemm != "auto" and not gemm.usable(config.gemm, device, dtype)
        wanted = "auto" if moved else config.gemm
        route = next(name for name, p in gemm.ROUTES.items() if p is gemm.resolve(wanted, device, dtype))
        gates = _gates(config, backend, device, spec.activation.name)
    except ValueError as e:
        raise UserError(f"--{e}") from e
    # Small products are fast by any route, and not worth results that depend on a measurement.
    if wanted == "auto" and (channels := spec.output_size) >= MEASURED and not config.deterministic:
        route = gemm.fastest(device, dtype, ROWS, spec.kernel_size * channels, spec.activation.gates * channels)
    return {"backend": backend, "gemm": route, "gates": gates}


def _gates(config: HardwareConfig, backend: str, device: torch.device, activation: str) -> str:
    settings = (device, COMPUTE[config.precision], activation)
    if backend == "triton":
        try:
            return ops.resolve_gates("triton", *settings)
        except ValueError as e:
            raise ValueError(f"backend: {str(e).removeprefix('gates: ').partition(';')[0]}") from e
    try:
        return ops.resolve_gates(config.gates, *settings)
    except ValueError:
        if not config.is_continued():
            raise
        return ops.resolve_gates("auto", *settings)


class Core:
    """Entry of a core, with defaults that suit a baseline; a subclass overrides what differs.

    Class attributes:
        module: class of the core.
        reads: settings that it reads, among those that only some cores read.
        adds_output: whether the output channels are added to `nhid`.
    """

    module: type[nn.Module]
    reads: frozenset[str] = frozenset()
    adds_output = False

    @property
    def name(self) -> str:
        """Value of `--model`."""
        return self.module.core_name

    def check(self, config: "CoreConfig") -> None:
        """Raise UserError if the core cannot run these settings."""
        if config.backend not in ("auto", "reference"):
            raise UserError(
                f"--backend {config.backend}: only TrellisNet has it; --model {self.name} needs auto or reference"
            )

    def check_language_model(self, config: "LanguageModelConfig") -> None:
        """Raise UserError if a language model with this core cannot run these settings."""

    def reach(self, config: "CoreConfig") -> int:
        """Return the number of time steps back that the core reads.

        Raises:
            UserError: it has no such limit.
        """
        raise UserError(f"--horizon auto: works only for a TrellisNet; pass a number with --model {self.name}")

    def options(self, config: "CoreConfig") -> dict[str, Any]:
        """Return keywords for a model: the class of the core, `core`, and options of that class."""
        return {"core": self.module, "hidden_dropout": config.dropouth}

    def language_model_options(self, config: "LanguageModelConfig") -> dict[str, Any]:
        """Return keywords for a language model."""
        options = self.options(config) | {"input_dropout": config.dropouti}
        mixture = {"prior_bias": False, "dropout_after_tanh": True}
        return options | ({"mixture": mixture} if config.n_experts else {})

    def embedding_init(self, token: str) -> Callable[[Tensor], Any] | None:
        """Return the initialisation of an embedding of "words" or "symbols" by the core's authors; None: U(±0.1)."""
        return None

    def init_head(self, head: nn.Module) -> None:
        """Initialise the head of a language model as the core's authors do, if they differ from TrellisNet's."""

    def no_graph(self) -> str:
        """Say why training steps cannot be a CUDA graph; empty if they can."""
        return f"--model {self.name} is not recorded"

    def notices(self, config: "CoreConfig", device: torch.device) -> list[str]:
        """Return lines that tell the user which faster kernels cannot run, and why."""
        return []

    def resolve(self, config: "CoreConfig", device: torch.device) -> dict[str, str]:
        """Return the settings among `backend`, `gemm` and `gates` that are chosen for this device.

        Raises:
            UserError: the settings request something that cannot run here.
        """
        return {"backend": "reference"}  # torch's own operators


class _Trellis(Core):
    module = TrellisNet
    reads = frozenset(
        "ksize dilation wnorm wdrop temporalwdrop activation mixed_group inject_every init_gain recompute aux grow "
        "random_depth eval_depths eval_nlevels early_exit "
        "equilibrium solver tolerance max_evaluations phantom".split()
    )
    adds_output = True

    def check(self, config: "CoreConfig") -> None:
        needs = {"ksize": 2, "dilation": [1], "activation": "lstm", "mixed_group": 0, "inject_every": 1, "aux": 0}
        for name, value in (needs if config.equilibrium else {}).items():
            if getattr(config, name, value) != value:
                value = " ".join(map(str, value)) if isinstance(value, list) else value
                raise UserError(f"--equilibrium: needs --{name} {value}")
        for name in LAYERED if config.equilibrium else ():
            if getattr(config, name, None):  # early exits are of texts
                raise UserError(f"--{name}: has no effect with --equilibrium, which has no layers; leave it out")
        for name in () if config.equilibrium else SOLVING:
            if getattr(config, name) != config.preset_value(name):
                raise UserError(f"--{name}: has no effect without --equilibrium")

    def reach(self, config: "CoreConfig") -> int:
        if config.equilibrium:
            raise UserError("--horizon auto: an equilibrium has no finite reach; pass a number with --equilibrium")
        return self._spec(config).reach

    def options(self, config: "CoreConfig") -> dict[str, Any]:
        """Return the keywords, as in :meth:`Core.options`.

        Raises:
            UserError: the channels do not form equal groups, or the input does not reach the output through them.
        """
        groups, hidden_size = config.mixed_group, config.channels()
        if groups and hidden_size % groups:
            raise UserError(
                f"--mixed_group {groups}: does not divide the {hidden_size} channels (output included); "
                f"pass --nhid {config.nhid + -hidden_size % groups}"
            )
        climbs = config.nhid // (hidden_size // groups) if groups else 0
        if climbs >= min(config.depths()):
            advice = f"pass --nlevels {climbs + 1} or more"
            if climbs < config.nlevels:
                advice = f"begin --grow or --random_depth with {climbs + 1} layers or more"
            raise UserError(
                f"--mixed_group {groups}: the input climbs one group per layer and would not reach the output; {advice}"
            )
        if shallow := [depth for depth in (*config.eval_depths, config.eval_nlevels) if 0 < depth <= climbs]:
            raise UserError(
                f"--mixed_group {groups}: the input climbs one group per layer and would not reach the output of "
                f"{counted(shallow[0], 'layers')}; score with {climbs + 1} layers or more"
            )
        solving = {}
        if config.equilibrium:
            solving = {"core": EquilibriumTrellisNet} | {name: getattr(config, name) for name in SOLVING}
        return (
            super().options(config)
            | solving
            | {
                "kernel_size": config.ksize,
                "dilation": config.dilation,
                "weight_norm": config.wnorm,
                "weight_dropout": config.wdrop,
                "temporal_weight_dropout": config.temporalwdrop,
                "activation": config.activation,
                "kernel_groups": groups or None,
                "inject_every": config.inject_every,
                "init_gain": config.init_gain or None,
                "recompute": config.recompute,
                "recompute_every": config.recompute_every or None,
                "backend": config.backend,
                "gemm": config.gemm,
                "gates": config.gates,
            }
        )

    def language_model_options(self, config: "LanguageModelConfig") -> dict[str, Any]:
        return self.options(config) | {"input_dropout": config.dropouti}

    def no_graph(self) -> str:
        return ""

    def notices(self, config: "CoreConfig", device: torch.device) -> list[str]:
        if config.backend == "reference":
            reason = ops.not_fused(self._spec(config))
            return [f"backend reference, slower than fused: {reason}"] if reason else []
        reason = ops.slow_gates(device, COMPUTE[config.precision], config.activation)
        return [f"gates eager, {reason}"] if config.gates == "eager" and reason else []

    def resolve(self, config: "CoreConfig", device: torch.device) -> dict[str, str]:
        return resolve_execution(config, self._spec(config), device, recompute=config.recompute)

    @staticmethod
    def _spec(config: "CoreConfig") -> ops.TrellisSpec:
        groups, activation = config.mixed_group or None, ops.find_activation(config.activation)
        return ops.TrellisSpec(
            config.nlevels, config.channels(), activation, config.dilation, config.ksize, groups, config.inject_every
        )


class _AWDLSTM(Core):
    module = AWDLSTM
    reads = frozenset({"wdrop"})

    def options(self, config: "CoreConfig") -> dict[str, Any]:
        return super().options(config) | {"weight_dropout": config.wdrop}


class _TCN(Core):
    module = TCN
    reads = frozenset({"ksize"})

    def check(self, config: "CoreConfig") -> None:
        super().check(config)
        if config.nlevels > 30:
            raise UserError(f"--nlevels {config.nlevels}: expected at most 30, as a TCN doubles its dilation per block")

    def check_language_model(self, config: "LanguageModelConfig") -> None:
        if config.repack:
            raise UserError("--repack: a TCN carries no state; pass --no-repack and a --seq_len above --horizon")

    def options(self, config: "CoreConfig") -> dict[str, Any]:
        return super().options(config) | {"kernel_size": config.ksize}

    def language_model_options(self, config: "LanguageModelConfig") -> dict[str, Any]:
        """Return the keywords; a TCN has its own input dropout, of single numbers instead of whole channels."""
        core = functools.partial(TCN, input_dropout=config.dropouti)
        return super().language_model_options(config) | {"core": core, "input_dropout": 0.0}

    def embedding_init(self, token: str) -> Callable[[Tensor], Any] | None:
        return functools.partial(nn.init.normal_, std=tcn.INIT_STD) if token == "words" else None


class _RHN(Core):
    module = RHN
    reads = frozenset({"gate_bias", "rhn_masks"})

    def check_language_model(self, config: "LanguageModelConfig") -> None:
        if config.nout != config.nhid:
            raise UserError(
                f"--nout {config.nout}: the output of a recurrent highway network is its state; pass --nout "
                f"{config.nhid}, and --emsize {config.nhid} when tied"
            )

    def options(self, config: "CoreConfig") -> dict[str, Any]:
        separate = config.rhn_masks == "separate"
        return super().options(config) | {"gate_bias": config.gate_bias, "separate_masks": separate}

    def language_model_options(self, config: "LanguageModelConfig") -> dict[str, Any]:
        """Return the keywords; with separate masks the core drops its input itself."""
        options = super().language_model_options(config)
        if options["separate_masks"]:
            options |= {"core": functools.partial(RHN, input_dropout=config.dropouti), "input_dropout": 0.0}
        return options

    def embedding_init(self, token: str) -> Callable[[Tensor], Any]:
        return functools.partial(nn.init.uniform_, a=-rhn.INIT_RANGE, b=rhn.INIT_RANGE)

    def init_head(self, head: nn.Module) -> None:
        nn.init.uniform_(head.bias, -rhn.INIT_RANGE, rhn.INIT_RANGE)


class _SparseLSTM(Core):
    module = SparseStack
    reads = frozenset({"wdrop", "sparse_mode", "sparse_fract"})

    def options(self, config: "CoreConfig") -> dict[str, Any]:
        own = {"weight_dropout": config.wdrop, "mode": config.sparse_mode, "fraction": config.sparse_fract}
        return super().options(config) | own


CORES = {core.name: core for core in (_Trellis(), _AWDLSTM(), _TCN(), _RHN(), _SparseLSTM())}
# Settings that only some cores read. Other cores refuse them instead of ignoring them silently.
PARTICULAR = frozenset().union(*(core.reads for core in CORES.values()))
