"""The settings of the trellis itself, which all tasks share."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import torch

from trellisnet import ops
from trellisnet.errors import UserError
from trellisnet.ops import gemm
from trellisnet.training.config import RunConfig, setting

MEASURED = 100  # channels from which on the route of the products is measured
ROWS = 512  # of the products that are measured
COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(kw_only=True)
class NetworkConfig(RunConfig):
    """Settings of a TrellisNet, under the authors' names where they have one."""

    nhid: int = setting(1000, "hidden channels without the output channels")
    nlevels: int = setting(58, "layers")
    ksize: int = setting(2, "kernel size")
    dilation: list[int] = setting([1], "dilations, cycled over the layers")
    wnorm: bool = setting(True, "weight normalisation")
    dropouth: float = setting(0.0, "hidden dropout, one mask a sequence for all layers")
    wdrop: float = setting(0.0, "DropConnect on both kernels")
    temporalwdrop: bool = setting(True, "DropConnect on the older taps only")
    activation: str = setting("lstm", "gates of a layer", choices=tuple(ops.GATES))
    mixed_group: int = setting(0, "groups of a mixed group convolution (Theorem 1); 0: a dense kernel")
    inject_every: int = setting(1, "inject the input every so many layers")

    recompute: bool = setting(False, "compute layers again in the backward pass instead of keeping them: less memory")
    recompute_every: int = setting(0, "with --recompute: keep every so many layers; 0: the root of their number")

    def validate(self) -> None:
        super().validate()
        self.check_at_least(0, "recompute_every")
        self.check_at_least(1, "nhid", "nlevels", "inject_every")
        self.check_at_least(2, "ksize")
        self.check_at_least(0, "mixed_group")
        self.check_rates("dropouth", "wdrop")
        if min(self.dilation, default=0) < 1:
            raise UserError(f"--dilation: expected integers ≥ 1, got {self.dilation}")

    def core_options(self) -> dict[str, Any]:
        """Keywords of :class:`trellisnet.TrellisNet`.

        Raises:
            UserError: the channels do not make equal groups, or the input does not reach the output through them.
        """
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
            if not self.resume:
                raise
            return ops.resolve_gates("auto", *settings)

    def notices(self) -> list[str]:
        """What the user should know of the choices that were made."""
        if self.backend == "reference" and (reason := ops.not_fused(self.activation, self.mixed_group or None)):
            return [f"backend reference, slower than fused: {reason}"]
        return []

    def channels(self) -> int:
        """H, the hidden channels with those of the output."""
        raise NotImplementedError

    def chosen(self, device: torch.device) -> Self:
        """These settings with backend, products and gates decided: once, for a continued run must compute the same.

        Raises:
            UserError: what was asked for cannot run here.
        """
        config, dtype = super().chosen(device), COMPUTE[self.precision]
        try:
            backend = ops.resolve(self.backend, self.activation, self.mixed_group or None)
            if self.recompute and backend == "reference":
                reason = ops.not_fused(self.activation, self.mixed_group or None) or "--backend reference keeps all"
                raise ValueError(f"recompute: only the backend fused can, and {reason}")
            if backend == "reference":
                return dataclasses.replace(config, backend=backend)
            # A run that goes on elsewhere may have to multiply in another way.
            moved = self.resume and self.gemm != "auto" and not gemm.usable(self.gemm, device, dtype)
            wanted = "auto" if moved else self.gemm
            route = next(name for name, p in gemm.ROUTES.items() if p is gemm.resolve(wanted, device, dtype))
            gates = self._gates(backend, device)
        except ValueError as e:
            raise UserError(f"--{e}") from e
        # Small products take no time by any route, and are not worth results that depend on a stopwatch.
        if wanted == "auto" and self.channels() >= MEASURED and not self.deterministic:
            inputs, outputs = self.ksize * self.channels(), ops.GATES[self.activation] * self.channels()
            route = gemm.fastest(device, dtype, ROWS, inputs, outputs)
        return dataclasses.replace(config, backend=backend, gemm=route, gates=gates)
