"""Bug report: `python -m trellisnet` prints versions, hardware, kernels, and the folders of data and models."""

import os
import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy
import torch

import trellisnet
from trellisnet import console, weights
from trellisnet.data import PROJECT
from trellisnet.errors import LINE, shown
from trellisnet.ops import BACKENDS, GATE_KERNELS, GEMMS, fused, gemm
from trellisnet.training.runlog import commit, machine

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def version() -> str:
    """Version and source of the package."""
    source = os.path.dirname(trellisnet.__file__)
    return f"{trellisnet.__version__}, commit {commit() or 'unknown'}, in {source}"


def software() -> str:
    """Versions of Python, torch and numpy."""
    return f"Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}"


def device() -> torch.device:
    """The device that `--device auto` takes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hardware() -> str:
    """Device and threads."""
    reason = "" if torch.version.cuda else " (this torch is built without CUDA)"
    cuda = f"CUDA {torch.version.cuda}" if device().type == "cuda" else f"no CUDA device{reason}"
    return f"{device()} ({machine(device())}), {cuda}, threads: {torch.get_num_threads()}"


def backends() -> str:
    """Backends of the trellis operator."""
    reasons = {"triton": fused.no_triton() or ("it needs a CUDA device" if device().type != "cuda" else "")}
    return _listed((name, reasons.get(name, "")) for name in BACKENDS if name != "auto")


def gates() -> str:
    """Gate kernels of the fused operator, for an LSTM."""
    names = [name for name in GATE_KERNELS if name != "auto"]
    return _listed((name, fused.reason_against(name, device(), torch.float32, "lstm")) for name in names)


def products() -> str:
    """Libraries for matrix products, by precision."""
    usable = {name: [p for p, dtype in PRECISIONS.items() if gemm.usable(name, device(), dtype)] for name in GEMMS[1:]}
    return ", ".join(f"{name} ({', '.join(precisions) or 'not usable here'})" for name, precisions in usable.items())


def data() -> str:
    """Folders of data."""
    return _folders(PROJECT / "data")


def models() -> str:
    """Shipped models, by the name that `load_pretrained` takes."""
    return f"{os.path.abspath(PROJECT / 'results')}: {', '.join(path.name for path in weights.shipped()) or 'none'}"


def runs() -> str:
    """Folders of runs, by task."""
    return _folders(PROJECT / "runs")


def _folders(parent: Path) -> str:
    names = sorted(path.name for path in parent.glob("*") if path.is_dir() and any(path.iterdir()))
    return f"{os.path.abspath(parent)}: {', '.join(names) or 'none'}"


def _listed(choices: Iterable[tuple[str, str]]) -> str:
    """List the choices that can run, then the others with the reason against each."""
    usable, others = [], []
    for name, reason in choices:
        (others if reason else usable).append(f"{name}: {reason}" if reason else name)
    return "; ".join([", ".join(usable) or "none", *(f"not {line}" for line in others)])


# Label → the rest of its line.
LINES: dict[str, Callable[[], str]] = {
    "trellisnet": version, "software": software, "system": platform.platform, "device": hardware,
    "backends": backends, "gates": gates, "products": products, "data": data, "models": models, "runs": runs,
}  # fmt: skip


def lines() -> Iterator[str]:
    """Lines of the report; a line that cannot be determined gives the reason."""
    for label, line in LINES.items():
        try:
            text = line()
        except Exception as e:  # a broken installation is what a report is for
            text = f"unknown ({type(e).__name__}: {e})"
        yield shown(f"{label + ':':12}{text}", LINE)


@console.lenient()
def main() -> None:
    """Print the report."""
    print(*lines(), sep="\n")


if __name__ == "__main__":
    main()
