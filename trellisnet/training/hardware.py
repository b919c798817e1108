"""What the hardware decides: device, threads, precision, operators, CUDA graphs."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch

from trellisnet import ops
from trellisnet.errors import UserError
from trellisnet.training.settings import Settings, setting

GRAPHS = ("auto", "on", "off")
PRECISIONS = ("fp32", "tf32", "bf16")
MOST_THREADS = 1024  # libraries crash where they cannot start as many as they are asked for


@dataclass(kw_only=True)
class HardwareConfig(Settings):
    """Settings of where and with which kernels a program computes."""

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
        "auto", "gate kernels of the fused operator; auto: compiled if built",
        group="hardware", resumable=True, choices=ops.GATE_KERNELS,
    )  # fmt: skip
    precision: str = setting(
        "fp32", "of products and activations (tf32: CUDA only); sums and losses are in fp32",
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
        """Whether the run was started before, perhaps on other hardware."""
        return False

    def torch_device(self) -> torch.device:
        """The device to run on.

        Raises:
            UserError: no such device here.
        """
        wanted = self.device
        if wanted == "auto":
            wanted = "cuda" if self.cuda and torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(wanted)
            torch.empty(1, device=device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as e:
            raise UserError(f"--device {wanted}: not usable here ({str(e).splitlines()[0]}); try --device cpu") from e
        return device

    def notices(self, device: torch.device) -> list[str]:
        """Lines on the choices made for this device that the user should know of."""
        reason = self.no_graph(device) if device.type == "cuda" else ""
        return [f"no CUDA graph: {reason}"] if reason else []

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which models and losses are computed, for `precision`."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @contextlib.contextmanager
    def float32_products(self) -> Iterator[None]:
        """Compute single-precision products on CUDA in TF32 if `precision` says so, in full otherwise.

        Left alone, torch takes TF32 for convolutions and not for other products.
        """

        def choose(products: str, convolutions: bool) -> tuple[str, bool]:
            """Returns the settings before."""
            with warnings.catch_warnings():  # some versions announce names that older ones do not have
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

    def chosen(self, device: torch.device) -> Self:
        """These settings with every choice made that was left to the machine.

        Raises:
            UserError: the settings ask for something that cannot run here.
        """
        moved = self.is_continued()  # then another choice is better than none
        if self.precision == "tf32" and device.type != "cuda" and not moved:
            raise UserError(f"--precision tf32: needs a CUDA device, got {device.type}; pass fp32 or bf16")
        reason = self.no_graph(device)
        if self.cuda_graph == "on" and reason and not moved:
            raise UserError(f"--cuda_graph on: {reason}; pass auto or off")
        cuda_graph = "off" if reason else {"auto": "on"}.get(self.cuda_graph, self.cuda_graph)
        return dataclasses.replace(self, threads=torch.get_num_threads(), cuda_graph=cuda_graph)

    def no_graph(self, device: torch.device) -> str:
        """Why a training step cannot be a CUDA graph; empty if it can."""
        if device.type != "cuda":
            return f"needs a CUDA device, got {device.type}"
        several = torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
        return "processes that train together exchange gradients within a step" if several else ""
