"""Settings that depend on the hardware: device, threads, precision, operators, CUDA graphs."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch

from trellisnet import ops
from trellisnet.errors import UserError
from trellisnet.training.distributed import Ranks
from trellisnet.training.settings import Settings, setting

GRAPHS = ("auto", "on", "off")
PRECISIONS = ("fp32", "tf32", "bf16")
MOST_THREADS = 1024  # libraries crash if they cannot start as many as they are asked for


@dataclass(kw_only=True)
class HardwareConfig(Settings):
    """Device, precision and kernels of a program."""

    cuda: bool = setting(True, "use a CUDA device if there is one", group="hardware", resumable=True)
    device: str = setting(
        "auto", "any torch device; auto: cuda if there is one and --cuda, else cpu", group="hardware", resumable=True
    )
    threads: int = setting(
        0, "CPU threads; 0: torch's choice", group="hardware", resumable=True, at_least=0, at_most=MOST_THREADS
    )
    backend: str = setting("auto", "trellis operator", group="hardware", choices=ops.BACKENDS)
    gemm: str = setting(
        "auto", "library for the matrix products of the fused operator; auto: the fastest here",
        group="hardware", resumable=True, choices=ops.GEMMS,
    )  # fmt: skip
    gates: str = setting(
        "auto", "gate kernels of the fused operator; auto: the fastest here",
        group="hardware", resumable=True, choices=ops.GATE_KERNELS,
    )  # fmt: skip
    precision: str = setting(
        "fp32", "precision of products and activations (tf32: CUDA only); sums and losses are in fp32",
        group="hardware", choices=PRECISIONS,
    )  # fmt: skip
    cuda_graph: str = setting(
        "auto", "replay training steps as a CUDA graph; auto: wherever possible",
        group="hardware", resumable=True, choices=GRAPHS,
    )  # fmt: skip
    deterministic: bool = setting(
        False, "bit-equal results from run to run on one machine, at some cost", group="hardware"
    )

    def is_continued(self) -> bool:
        """Return whether this process resumes a run, perhaps on other hardware."""
        return False

    def wanted_device(self) -> str:
        """Return the name of the device to run on, whether this machine has it or not."""
        if self.device != "auto":
            return self.device
        return "cuda" if self.cuda and torch.cuda.is_available() else "cpu"

    def torch_device(self) -> torch.device:
        """Return the device to run on.

        Raises:
            UserError: this machine does not have it.
        """
        wanted = self.wanted_device()
        try:
            device = torch.device(wanted)
            torch.empty(1, device=device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as e:
            raise UserError(f"--device {wanted}: not usable here ({str(e).splitlines()[0]}); try --device cpu") from e
        return device

    def notices(self, device: torch.device) -> list[str]:
        """Return lines that tell the user which fast path this device cannot take, and why."""
        reason = self.no_graph(device) if device.type == "cuda" else ""
        return [f"no CUDA graph: {reason}"] if reason else []

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context in which models and losses run in `precision`."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @contextlib.contextmanager
    def float32_products(self) -> Iterator[None]:
        """Compute single-precision products on CUDA in TF32 if `precision` is tf32, else in full precision.

        By default torch uses TF32 for convolutions, but not for other products.
        """

        def choose(products: str, convolutions: bool) -> tuple[str, bool]:
            """Return the previous settings."""
            with warnings.catch_warnings():  # newer versions of torch recommend names that 2.6 lacks
                warnings.filterwarnings("ignore", "Please use the new API")
                before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
                torch.set_float32_matmul_precision(products)
                torch.backends.cudnn.allow_tf32 = convolutions
            return before

        tf32 = self.precision == "tf32"
        before = choose("high" if tf32 else "highest", tf32)
        try:
            yield
        finally:
            choose(*before)

    def resolved(self, device: torch.device) -> Self:
        """Return a copy in which every choice left to the machine is made.

        Raises:
            UserError: the settings request something that cannot run here.
        """
        moved = self.is_continued()  # a run that moves to another machine takes what this one has
        if self.precision == "tf32" and device.type != "cuda" and not moved:
            raise UserError(f"--precision tf32: needs a CUDA device, got {device.type}; pass fp32 or bf16")
        reason = self.no_graph(device)
        if self.cuda_graph == "on" and reason and not moved:
            raise UserError(f"--cuda_graph on: {reason}; pass auto or off")
        cuda_graph = "off" if reason else {"auto": "on"}.get(self.cuda_graph, self.cuda_graph)
        return dataclasses.replace(self, threads=torch.get_num_threads(), cuda_graph=cuda_graph)

    def no_graph(self, device: torch.device) -> str:
        """Say why a training step cannot be a CUDA graph; empty if it can."""
        if device.type != "cuda":
            return f"needs a CUDA device, got {device.type}"
        several = Ranks.of_environment().size > 1
        return "processes that train together exchange gradients within a step" if several else ""
