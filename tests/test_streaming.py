"""Streaming: pieces of any length equal one long pass, for all kinds of layers."""

import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from trellisnet import TrellisNet
from trellisnet.ops import compiled, streaming

GEOMETRIES = [(2, (1,)), (3, (1,)), (2, (1, 2, 4)), (3, (2, 1)), (2, (1, 1, 2, 4, 8, 16, 32))]


def net(num_layers=7, **options):
    torch.manual_seed(3)
    module = TrellisNet(3, 6, num_layers, **{"weight_norm": True, "output_size": 4, "dtype": torch.float64, **options})
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5)
    return module.eval()


def x_of(length, n=2):
    return torch.randn(n, length, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def pieces(module, x, sizes):
    stream, outputs, at = module.init_stream(x.size(0)), [], 0
    for size in sizes:
        output, stream = module.stream(x[:, at : at + size], stream)
        outputs.append(output)
        at += size
    assert at == x.size(1)
    return torch.cat(outputs, dim=1), stream


@pytest.mark.parametrize(("kernel_size", "dilation"), GEOMETRIES)
@pytest.mark.parametrize("size", [1, 7, 64, 200])
def test_pieces_equal_one_long_pass(kernel_size, dilation, size):
    module, x = net(kernel_size=kernel_size, dilation=dilation), x_of(203)
    sizes = [size] * (203 // size) + [203 % size] * bool(203 % size)
    output, _ = pieces(module, x, sizes)
    assert_close(output, module(x).output, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("kernel_size", "dilation"), GEOMETRIES)
def test_steps_equal_one_long_pass(kernel_size, dilation):
    module, x = net(kernel_size=kernel_size, dilation=dilation), x_of(90)
    stream, outputs = module.init_stream(2), []
    for t in range(90):
        output, stream = module.step(x[:, t], stream)
        outputs.append(output)
    assert_close(torch.stack(outputs, dim=1), module(x).output, atol=1e-12, rtol=0)


@pytest.mark.parametrize("activation", ["lstm", "gru", "tanh"])
@pytest.mark.parametrize("kernel_groups", [None, 1, 3])
@pytest.mark.parametrize("inject_every", [1, 3])
@pytest.mark.parametrize("num_layers", [1, 5])
def test_every_kind_of_layer(activation, kernel_groups, inject_every, num_layers):
    options = {"activation": activation, "kernel_groups": kernel_groups, "inject_every": inject_every}
    module, x = net(num_layers, dilation=(1, 2), **options), x_of(20)
    expected = module(x).output
    output, stream = pieces(module, x[:, :13], [1, 3, 9])
    assert_close(output, expected[:, :13], atol=1e-12, rtol=0)
    for t in range(13, 20):  # pieces and steps alternate
        output, stream = module.step(x[:, t], stream)
        assert_close(output, expected[:, t], atol=1e-12, rtol=0)


def test_a_step_computes_one_position_per_layer(monkeypatch):
    module, x = net(num_layers=9), x_of(1)
    assert streaming.step(x[:, 0], module.init_stream(2))[3] == 9
    products = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm"):
                products.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    stream = module.init_stream(2)
    with Watch():
        module.step(x[:, 0], stream)
    # x̃, the old taps of all layers, the newest tap of every layer but the first
    assert products == ["addmm_", "mm"] + ["addmm_"] * 8


def test_memory_does_not_grow():
    module = net(dilation=(1, 2, 4))
    sizes = set()
    stream = module.init_stream(2)
    for length in (1, 5, 300, 2):
        _, stream = module.stream(x_of(length), stream)
        tensors = [stream.x, *stream.h, *stream.c]
        sizes.add(sum(t.numel() for t in tensors))
        assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)
    assert len(sizes) == 1


def test_a_stream_can_be_continued_twice_and_keeps_its_kernels():
    module, x = net(), x_of(10)
    _, stream = pieces(module, x[:, :6], [6])
    first = module.stream(x[:, 6:], stream)[0]
    module.step(x[:, 9], stream)
    with torch.no_grad():
        module.bias.add_(1)
    assert torch.equal(module.stream(x[:, 6:], stream)[0], first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"gates": "auto"}, {"gates": "eager"}, {"activation": "gru"}])
def test_weights_of_16_bits(options, dtype):
    """Cells and gates are in float32, as in a forward pass, and outputs in the dtype of the weights."""
    module, x = net(**options).to(dtype), x_of(9).to(dtype)
    exact = net(**options, backend="reference")
    exact.load_state_dict(module.state_dict())
    outputs, stream = pieces(module, x[:, :5], [2, 3])
    steps = []
    for x_t in x[:, 5:].unbind(1):
        output, stream = module.step(x_t, stream)
        steps.append(output)
    outputs = torch.cat([outputs, torch.stack(steps, dim=1)], dim=1)
    assert outputs.dtype == dtype
    assert {part.dtype for part in stream.c} == {torch.float32}
    assert_close(outputs.double(), exact(x.double()).output, atol=8 * torch.finfo(dtype).eps, rtol=0)


def test_no_dropout_and_no_gradients():
    module, x = net(hidden_dropout=0.5, weight_dropout=0.5), x_of(5)
    expected = module(x).output
    output, _ = pieces(module.train(), x, [2, 3])
    assert_close(output, expected, atol=1e-12, rtol=0)
    assert not output.requires_grad
    single = net().float()
    assert pieces(single, x.float(), [5])[0].dtype == torch.float32


def test_bad_input_is_named():
    module = net()
    stream = module.init_stream(2)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        module.init_stream(0)
    with pytest.raises(ValueError, match=r"x: expected \(2, T ≥ 1, 3\), got \(1, 4, 3\)"):
        module.stream(x_of(4, n=1), stream)
    with pytest.raises(ValueError, match=r"x: expected \(2, T ≥ 1, 3\), got \(2, 0, 3\)"):
        module.stream(x_of(0), stream)
    with pytest.raises(ValueError, match=r"x_t: expected \(2, 3\), got \(2, 4, 3\)"):
        module.step(x_of(4), stream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 63), (64, 64), (131, 200), (600, 1_025)])
def test_the_compiled_product(dtype, inputs, outputs):
    if reason := compiled.reason_against(torch.device("cpu"), dtype, "lstm"):
        pytest.skip(f"compiled product: {reason}")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    packed = compiled.pack(weight)
    for n in (1, compiled.FEW):
        rows, target = (torch.randn(n, size, generator=generator).to(dtype) for size in (inputs, outputs))
        exact = target.double() + rows.double() @ weight.double().T
        compiled.add_product(target, rows, packed)
        assert_close(target.double(), exact, atol=1e-6 * inputs, rtol=1e-6 if dtype == torch.float32 else 2**-8)


def test_the_compiled_product_refuses_bad_input():
    if reason := compiled.reason_against(torch.device("cpu"), torch.float32, "lstm"):
        pytest.skip(f"compiled product: {reason}")
    packed = compiled.pack(torch.ones(5, 8))
    with pytest.raises(ValueError, match="rows: expected contiguous"):
        compiled.add_product(torch.zeros(1, 5), torch.ones(1, 6), packed)
    with pytest.raises(ValueError, match="rows: expected contiguous"):
        compiled.add_product(torch.zeros(2, 5), torch.ones(8, 2).T, packed)
    with pytest.raises(ValueError, match="target: expected contiguous"):
        compiled.add_product(torch.zeros(1, 5, dtype=torch.bfloat16), torch.ones(1, 8), packed)


@pytest.mark.parametrize("n", [1, compiled.FEW, compiled.FEW + 1])
@pytest.mark.parametrize("gates", ["auto", "eager"])
@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_steps_by_either_product(n, gates, low):
    module = net(dtype=torch.float32, gates=gates)
    x = x_of(20, n).float()
    stream = None
    with torch.autocast("cpu", low, enabled=low is not None):
        stream = module.init_stream(n)
        for t in range(20):
            y, stream = module.step(x[:, t], stream)
    assert_close(y, module(x).output[:, -1], atol=1e-5 if low is None else 3e-2, rtol=0)


class Piece(nn.Module):
    """The next steps of a stream as a function of tensors, for programs that are exported or traced."""

    def __init__(self, net, method):
        super().__init__()
        self.net, self.method, self.kernels = net, method, net.init_stream(2).kernels

    def forward(self, x, *state):
        rows = (len(state) - 1) // 2
        stream = streaming.Stream(self.kernels, state[0], state[1 : 1 + rows], state[1 + rows :])
        output, stream = getattr(self.net, self.method)(x, stream)
        return output, stream.x, *stream.h, *stream.c


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"activation": "gru", "kernel_size": 3}, {"inject_every": 2}])
@pytest.mark.parametrize("way", ["compile", "export", "trace"])
def test_a_step_can_be_compiled_exported_and_traced(way, options):
    module = net(3, dilation=(1, 2), dtype=torch.float32, **options)
    x = x_of(5).float()
    for method, size in (("step", 1), ("stream", 2)) if way == "compile" else (("step", 1),):
        piece, stream = Piece(module, method), module.init_stream(2)
        state, outputs = (stream.x, *stream.h, *stream.c), []
        parts = [part.squeeze(1) if method == "step" else part for part in x[:, : 5 // size * size].split(size, dim=1)]
        if way == "compile":
            torch._dynamo.reset()
            run = torch.compile(piece, backend="eager", fullgraph=True)
        elif way == "export":
            run = torch.export.export(piece, (parts[0], *state)).module()
        else:
            run = torch.jit.trace(piece, (parts[0], *state))
        for part in parts:
            output, *state = run(part, *state)
            outputs.append(output.view(2, size, -1))
        output = torch.cat(outputs, dim=1)
        assert_close(output, module(x).output[:, : output.size(1)])


@pytest.mark.parametrize("options", [{}, {"activation": "gru"}, {"activation": "tanh", "kernel_size": 3}])
def test_a_piece_exits_at_the_layer_from_which_outputs_hardly_move(options):
    module, x = net(12, **options), x_of(40)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(0.3)
        outputs = module(x, aux_every=1).aux
        moved = [((b - a).norm() / b.norm()).item() for a, b in itertools.pairwise(outputs)]
        assert moved[8] < 0.5 * moved[3]  # these weights converge
        for tolerance in (moved[3] * 1.001, moved[5] * 1.001):
            layers = next(i for i, share in enumerate(moved, start=2) if share < tolerance)
            output, stream = module.stream(x, module.init_stream(2), tolerance)
            assert stream.layers == layers < 12
            assert_close(output, module(x, num_layers=layers).output, atol=1e-12, rtol=0)

            stream, parts = module.init_stream(2), []
            for piece in x.split(13, dim=1):
                output, stream = module.stream(piece, stream, tolerance)
                assert stream.layers < 12
                parts.append(output)
            error = (torch.cat(parts, dim=1) - outputs[-1]).norm() / outputs[-1].norm()
            assert error < 3 * tolerance
        output, stream = module.stream(x, module.init_stream(2), 1e-30)
        assert stream.layers == 12
        assert torch.equal(output, module.stream(x, module.init_stream(2))[0])
        assert module.step(x[:, 0], stream)[1].layers == 12


def test_no_piece_exits_before_its_input_has_climbed_all_groups():
    module, x = net(9, kernel_groups=3, output_size=2), x_of(10)
    _, stream = module.stream(x, module.init_stream(2), 0.99999)
    assert stream.layers >= 4


@pytest.mark.filterwarnings("ignore")
def test_a_traced_program_cannot_exit_early():
    module, x = net(3), x_of(4)
    stream = module.init_stream(2)
    with pytest.raises(ValueError, match="^tolerance: expected 0 in a compiled, exported or traced program, got 0.1$"):
        torch.jit.trace(lambda x: module.stream(x, stream, 0.1)[0], (x,))
