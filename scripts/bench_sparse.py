"""Time three ways of computing a sparse LSTM layer, at the shapes of scripts/sparse_table.sh.

    python scripts/bench_sparse.py [--device cuda]

`parts` runs one LSTM of torch after the other, as :class:`trellisnet.baselines.sparse.SparseLSTM` does; `batched`
computes all parts by one batched product per time step; `dense` is one LSTM whose matrices are zero between the parts.
The three must agree before they are timed. Times are the best of several forward and backward passes.
"""

import functools
import signal
import sys
import time
from collections.abc import Sequence

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main takes signals: no traceback from an import

import torch
import torch.nn.functional as F
from torch import Tensor

from trellisnet.baselines import SparseLSTM
from trellisnet.errors import counted
from trellisnet.training.cli import guarded
from trellisnet.training.config import Parser, RunConfig

# Input channels, hidden channels, reduce_in, reduce_out of the layers; rows and steps of a window.
LAYERS = [(400, 1725, 1, 0.66666), (1725, 1725, 0.66666, 0.66666), (1725, 400, 0.66666, 1), (1150, 1150, 0.5, 0.5)]
ROWS, STEPS = 20, 70
TIMES = 5


def widest(layer: SparseLSTM) -> tuple[int, int]:
    """Largest input and hidden width of a part; narrower parts are padded with zeros."""
    return max(b - a for a, b in layer.inputs), max(d - c for c, d in layer.outputs)


def batched(layer: SparseLSTM, x: Tensor) -> Tensor:
    """Compute all parts by one batched product per time step."""
    (i, o), (N, L, _), outputs = widest(layer), x.shape, []
    inputs, weight_x, weight_h, bias = [], [], [], []
    for part, (a, b), (c, d) in zip(layer.parts, layer.inputs, layer.outputs, strict=True):
        width = d - c
        gates = part.weight_ih_l0.view(4, width, b - a), part.weight_hh_l0.view(4, width, width)
        both = (part.bias_ih_l0 + part.bias_hh_l0).view(4, width)
        inputs.append(F.pad(x[:, :, a:b], (0, i - (b - a))))
        weight_x.append(F.pad(gates[0], (0, i - (b - a), 0, o - width)).flatten(0, 1))
        weight_h.append(F.pad(gates[1], (0, o - width, 0, o - width)).flatten(0, 1))
        bias.append(F.pad(both, (0, o - width)).flatten())
    weight_x, weight_h, bias = map(torch.stack, (weight_x, weight_h, bias))
    z = torch.baddbmm(bias.unsqueeze(1), torch.stack(inputs).flatten(1, 2), weight_x.mT)  # (parts, N·L, 4o)
    z, recurrent = z.view(len(layer.parts), N, L, -1).unbind(2), weight_h.mT.contiguous()
    h = c = x.new_zeros(len(layer.parts), N, o)
    for t in range(L):
        i_, f, g, o_ = torch.baddbmm(z[t], h, recurrent).chunk(4, dim=-1)
        c = f.sigmoid() * c + i_.sigmoid() * g.tanh()
        h = o_.sigmoid() * c.tanh()
        outputs.append(h)
    y = torch.stack(outputs, dim=2)  # (parts, N, L, o)
    return torch.cat([y[k, :, :, : d - c] for k, (c, d) in enumerate(layer.outputs)], dim=-1)


def dense(layer: SparseLSTM, x: Tensor) -> Tensor:
    """Compute one LSTM whose matrices are zero between the parts."""
    H, rows_x, rows_h = layer.hidden_size, [], []
    for part, (a, b), (c, d) in zip(layer.parts, layer.inputs, layer.outputs, strict=True):
        rows_x.append(F.pad(part.weight_ih_l0.view(4, d - c, b - a), (a, layer.input_size - b)))
        rows_h.append(F.pad(part.weight_hh_l0.view(4, d - c, d - c), (c, H - d)))
    weights = [torch.cat(rows, dim=1).flatten(0, 1) for rows in (rows_x, rows_h)]
    for name in ("bias_ih_l0", "bias_hh_l0"):
        weights.append(torch.cat([getattr(part, name).view(4, -1) for part in layer.parts], dim=1).flatten())
    zeros = x.new_zeros(1, x.size(0), H)
    return torch.lstm(x, (zeros, zeros), weights, True, 1, 0.0, True, False, True)[0]


WAYS = {"parts": lambda layer, x: layer(x)[0], "batched": batched, "dense": dense}


def seconds(way: str, layer: SparseLSTM, x: Tensor) -> float:
    """Shortest time of a forward and backward pass, in seconds."""
    best = float("inf")
    for _ in range(TIMES):
        started = time.perf_counter()
        WAYS[way](layer, x).sum().backward()
        if x.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def run(argv: Sequence[str]) -> None:
    """Parse, measure, print."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="any torch device")
    parser.add_argument("--quick", action="store_true", help="a small layer")
    args = parser.parse_args(argv)
    device = RunConfig(device=args.device).torch_device()
    torch.manual_seed(0)
    threads = counted(torch.get_num_threads(), "threads")
    print(f"{threads}, torch {torch.__version__}, {ROWS} rows of {STEPS} steps, milliseconds")
    for inputs, hidden, reduce_in, reduce_out in [(40, 60, 0.5, 0.5)] if args.quick else LAYERS:
        layer = SparseLSTM(inputs, hidden, reduce_in=reduce_in, reduce_out=reduce_out, device=device)
        x = torch.randn(ROWS, STEPS, inputs, device=device, requires_grad=True)
        expected = layer(x)[0]
        for way, compute in WAYS.items():
            torch.testing.assert_close(compute(layer, x), expected, atol=1e-4, rtol=1e-3, msg=f"{way} is wrong")
        times = "  ".join(f"{way} {1000 * seconds(way, layer, x):.1f}" for way in WAYS)
        print(f"{inputs} → {hidden}, {len(layer.parts)} parts: {times}", flush=True)


main = functools.partial(guarded, run)

if __name__ == "__main__":
    sys.exit(main())
