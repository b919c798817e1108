"""Baselines: cores that :mod:`trellisnet.models` accepts in place of TrellisNet."""

from trellisnet.baselines.lstm import AWDLSTM
from trellisnet.baselines.rhn import RHN
from trellisnet.baselines.sparse import SparseEmbedding, SparseLSTM, SparseStack
from trellisnet.baselines.tcn import TCN

CORES = (AWDLSTM, TCN, RHN, SparseStack)

__all__ = ["AWDLSTM", "CORES", "RHN", "TCN", "SparseEmbedding", "SparseLSTM", "SparseStack"]
