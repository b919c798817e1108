"""Trellis Networks for sequence modelling (Bai, Kolter & Koltun, ICLR 2019)."""

__version__ = "0.2.0"

from trellisnet.core import TrellisNet, TrellisOutput

__all__ = ["TrellisNet", "TrellisOutput", "__version__"]
