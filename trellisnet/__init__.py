"""Trellis Networks for sequence modelling (Bai, Kolter & Koltun, ICLR 2019)."""

__version__ = "0.2.0"

from typing import TYPE_CHECKING, Any

from trellisnet.core import TrellisNet, TrellisOutput
from trellisnet.wrappers import Bidirectional, TrellisLSTM

if TYPE_CHECKING:
    from trellisnet.evaluation.pretrained import load_pretrained

__all__ = ["Bidirectional", "TrellisLSTM", "TrellisNet", "TrellisOutput", "__version__", "load_pretrained"]


def __getattr__(name: str) -> Any:
    """Import `load_pretrained`, which needs most of the package, only when it is asked for."""
    if name == "load_pretrained":
        from trellisnet.evaluation.pretrained import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
