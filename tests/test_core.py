"""TrellisNet: equality with torch's LSTM, causality, statelessness, and refused input."""

import copy
import io
import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from trellisnet import TrellisNet
from trellisnet.regularization import Masks


def net(**options):
    torch.manual_seed(3)
    options = {"weight_norm": False, "dtype": torch.float64} | options
    module = TrellisNet(3, 5, options.pop("num_layers", 4), **options)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5)
    return module


def x_of(n=2, length=7, dtype=torch.float64):
    return torch.randn(n, length, 3, generator=torch.Generator().manual_seed(5), dtype=dtype)


def lstm_as_trellis(lstm: nn.LSTM, num_layers: int) -> TrellisNet:
    """Put W_hh into the past tap and W_ih into the current one; torch's gate rows i, f, g, o become i, o, g, f."""
    size = lstm.hidden_size
    module = TrellisNet(lstm.input_size, size, num_layers, weight_norm=False, dtype=torch.float64)

    def reorder(rows):
        i, f, g, o = rows.chunk(4)
        return torch.cat([i, o, g, f])

    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        module.weight_h[:, :, 0] = reorder(lstm.weight_hh_l0)
        module.weight_x[:, :, 1] = reorder(lstm.weight_ih_l0)
        module.bias.copy_(reorder(lstm.bias_ih_l0 + lstm.bias_hh_l0))
    return module


@pytest.mark.parametrize(("length", "num_layers"), [(6, 6), (6, 11), (1, 1), (20, 20)])
def test_with_the_weights_of_an_lstm_it_equals_that_lstm(length, num_layers):
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 5, batch_first=True, dtype=torch.float64)
    x, h0, c0 = torch.randn(4, length, 3), torch.randn(4, 5), torch.randn(4, 5)
    x, h0, c0 = x.double(), h0.double(), c0.double()
    expected, (h, c) = lstm(x, (h0[None], c0[None]))
    out = lstm_as_trellis(lstm, num_layers)(x, (h0, c0))
    assert_close(out.output, expected, atol=1e-12, rtol=0)
    assert_close(out.state[0], h[0], atol=1e-12, rtol=0)
    assert_close(out.state[1], c[0], atol=1e-12, rtol=0)


def test_with_fewer_layers_it_equals_the_truncated_lstm():
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 5, batch_first=True, dtype=torch.float64)
    x, horizon = torch.randn(2, 12, 3, dtype=torch.float64), 4
    output = lstm_as_trellis(lstm, horizon)(x).output
    for t in range(horizon, 12):
        truncated, _ = lstm(x[:, t - horizon + 1 : t + 1])
        assert_close(output[:, t], truncated[:, -1], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("kernel_size", "dilation"), [(2, (1,)), (3, (1, 2)), (2, (1, 2, 4))])
def test_the_future_changes_no_bit_of_the_past(kernel_size, dilation):
    module, x = net(kernel_size=kernel_size, dilation=dilation), x_of(length=12)
    changed = x.clone()
    changed[:, 8:] = 100.0
    before, after = module(x, aux_every=1), module(changed, aux_every=1)
    for a, b in zip([before.output, *before.aux], [after.output, *after.aux], strict=True):
        assert torch.equal(a[:, :8], b[:, :8])
        assert not torch.equal(a[:, 8:], b[:, 8:])


@pytest.mark.parametrize(("kernel_size", "dilation", "field"), [(2, (1,), 5), (3, (1,), 9), (2, (1, 2, 4), 9)])
def test_receptive_field(kernel_size, dilation, field):
    module = net(kernel_size=kernel_size, dilation=dilation)
    assert module.receptive_field == field
    x = x_of(n=1, length=12).requires_grad_()
    module(x).output[:, -1].sum().backward()
    seen = x.grad.abs().sum(dim=(0, 2)).nonzero().flatten()
    assert 12 - seen.min() == field


def test_one_set_of_weights_for_all_layers():
    shallow, deep = net(num_layers=2), net(num_layers=9)
    assert [p.shape for p in shallow.parameters()] == [p.shape for p in deep.parameters()]
    assert {n for n, _ in deep.named_parameters()} == {"weight_x", "weight_h", "bias"}
    assert {n for n, _ in net(weight_norm=True).named_parameters()} == {
        "weight_x_v", "weight_x_g", "weight_h_v", "weight_h_g", "bias",
    }  # fmt: skip


def test_the_gradient_of_a_shared_weight_sums_over_the_layers():
    module, x = net(num_layers=3), x_of()
    module(x).output.sum().backward()
    copies = [[p.detach().clone().requires_grad_() for p in module.parameters()] for _ in range(3)]
    h = c = torch.zeros(2, 5, 7, dtype=torch.float64)
    shift = lambda z: nn.functional.pad(z, (1, 0))[:, :, :-1]  # noqa: E731
    order = [n for n, _ in module.named_parameters()]
    for layer in copies:
        w = dict(zip(order, layer, strict=True))
        x_padded, h_padded = (nn.functional.pad(z, (1, 0)) for z in (x.transpose(1, 2), h))
        z = nn.functional.conv1d(x_padded, w["weight_x"], w["bias"]) + nn.functional.conv1d(h_padded, w["weight_h"])
        i, o, g, f = z.chunk(4, dim=1)
        c = f.sigmoid() * shift(c) + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    h.sum().backward()
    for parameter, *parts in zip(module.parameters(), *copies, strict=True):
        assert_close(parameter.grad, sum(p.grad for p in parts), atol=1e-12, rtol=1e-12)


def test_initialisation():
    torch.manual_seed(0)
    module = TrellisNet(200, 300, 2)
    for p in (module.weight_x_v, module.weight_h_v, module.bias):
        assert p.std().item() == pytest.approx(0.01, rel=0.06)
        assert abs(p.mean().item()) < 1e-3
    assert_close(module.effective_weight("weight_h"), module.weight_h_v)


def test_a_forward_pass_leaves_nothing_behind():
    module, x = net(weight_norm=True, hidden_dropout=0.3, weight_dropout=0.3), x_of()
    module.train()
    before = copy.deepcopy(module.state_dict())
    module(x).output.sum().backward()
    twin = copy.deepcopy(module)  # fails if the module holds a tensor of the graph
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), before.values(), strict=True))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    twin.eval(), module.eval()
    assert torch.equal(twin(x).output, module(x).output)
    assert module.float()(x.float()).output.dtype == torch.float32


@pytest.mark.parametrize("arguments", [{}, {"last_only": True}, {"start": 3}, {"aux_every": 2}, {"lengths": [3, 5]}])
@pytest.mark.parametrize("activation", ["lstm", "tanh", "gru"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_an_output_changed_in_place_changes_nothing_else(backend, activation, arguments):
    x = torch.randn(2, 5, 3)
    with torch.no_grad():
        out = TrellisNet(3, 4, 4, activation=activation, backend=backend)(x, **arguments)
        others = [*out.state, *out.aux]
        before = [part.clone() for part in others]
        out.output.zero_()
    for part, value in zip(others, before, strict=True):
        assert torch.equal(part, value)


def test_evaluation_draws_no_random_numbers_and_training_does():
    module, x = net(hidden_dropout=0.5, weight_dropout=0.5), x_of()
    state = torch.get_rng_state()
    assert torch.equal(module.eval()(x).output, module(x).output)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(module.train()(x).output, module(x).output)


def test_all_layers_and_steps_share_the_hidden_mask():
    module, x = net(hidden_dropout=0.5), x_of()
    h0, c0 = torch.randn(2, 2, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]])
    masked = module(x, (h0, c0), masks=Masks(hidden=mask[:, :, None])).output
    for n in range(2):  # equals scaling the columns of weight_h, which every layer and step reads
        scaled = net()
        scaled.load_state_dict(module.state_dict())
        with torch.no_grad():
            scaled.weight_h.mul_(mask[n, :, None] / 0.5)
        assert_close(masked[n], scaled(x, (h0, c0)).output[n], atol=1e-14, rtol=0)
    assert torch.equal(module(x, masks=Masks()).output, module.eval()(x).output)


def test_streams_and_segments_differ_by_design():
    """Repackaging pads x with zeros and every layer with the last layer's state; see ops/reference.py."""
    module, x = net(), x_of(length=10)
    first = module(x[:, :5])
    second = module(x[:, 5:], first.state)
    whole = module(x).output
    assert_close(first.output, whole[:, :5], atol=1e-14, rtol=0)
    assert (second.output - whole[:, 5:]).abs().max() > 1e-3


def test_gradients_reach_the_carried_state():
    module, x = net(), x_of()
    h0 = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    c0 = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    out = module(x, (h0, c0))
    assert out.state[0].requires_grad
    out.output.sum().backward()
    assert h0.grad.abs().min() > 0
    assert c0.grad.abs().min() > 0


def test_repr_names_the_settings():
    assert "kernel_size=2, dilation=(1,), weight_norm=False" in repr(net())


@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize(("activation", "groups"), [("lstm", None), ("lstm", 4), ("gru", None)])
def test_kernels_start_as_asked(activation, groups, weight_norm):
    torch.manual_seed(1)
    options = {"activation": activation, "kernel_groups": groups, "weight_norm": weight_norm, "kernel_size": 3}
    authors, scaled = (TrellisNet(30, 80, 5, init_gain=gain, **options) for gain in (None, 2.0))
    suffix = "_v" if weight_norm else ""
    for name, p in authors.named_parameters():
        if not name.endswith("_g"):
            assert p.std().item() == pytest.approx(0.01, rel=0.1)
    for name, p in scaled.named_parameters():
        if name.endswith(suffix) and name != "bias" and not name.endswith("_g"):
            fan_in = 3 * (30 if name.startswith("weight_x") else 80 // (groups or 1))
            assert p.std().item() == pytest.approx(2 / fan_in**0.5, rel=0.05), name
    if weight_norm:
        norms = torch.linalg.vector_norm(scaled.weight_x_v, dim=(1, 2), keepdim=True)
        assert torch.equal(scaled.weight_x_g, norms)
    if activation == "lstm":  # rows run group by group, then i, o, g, f
        assert torch.equal(scaled.bias.view(groups or 1, 4, -1)[:, 3], torch.ones(groups or 1, 80 // (groups or 1)))
    assert scaled.bias.sum() == (80 if activation == "lstm" else 0)


def test_the_scaled_start_lets_a_distant_input_through():
    """One step of 1,000 at ten dilated layers' distance moves the last output, which the authors' start hides."""
    moved = {}
    for gain in (None, 2.0):
        torch.manual_seed(1)
        module = TrellisNet(1, 32, 10, dilation=[2**i for i in range(10)], init_gain=gain)
        x = torch.zeros(1, 1000, 1)
        x[0, 123] = 1.0  # on a path with taps of both kinds
        with torch.no_grad():
            moved[gain] = (module(x).output[0, -1] - module(torch.zeros_like(x)).output[0, -1]).norm().item()
    assert moved[None] < 1e-6 < 1e-3 < moved[2.0], moved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": 0}, "input_size: expected at least 1, got 0"),
        ({"num_layers": 0}, "num_layers: expected at least 1, got 0"),
        ({"output_size": 6}, "output_size: expected 1 to hidden_size = 5, got 6"),
        ({"kernel_size": 1}, "kernel_size: expected at least 2, got 1"),
        ({"dilation": ()}, "dilation: expected a sequence of integers ≥ 1, got ()"),
        ({"dilation": (1, 0)}, "dilation: expected a sequence of integers ≥ 1, got (1, 0)"),
        ({"dilation": 2}, "dilation: expected a sequence of integers ≥ 1, got 2"),
        ({"hidden_dropout": 1.0}, "hidden_dropout: expected a probability"),
        ({"weight_dropout": -0.1}, "weight_dropout: expected a probability"),
        ({"backend": "fast"}, "backend: expected one of auto, reference, fused, triton, got 'fast'"),
        ({"activation": "relu"}, "activation: expected one of lstm, gru, tanh, got 'relu'"),
        ({"kernel_groups": 2}, "kernel_groups: expected a divisor of hidden_size = 5, got 2"),
        ({"kernel_groups": 0}, "kernel_groups: expected at least 1, got 0"),
        ({"inject_every": 0}, "inject_every: expected at least 1, got 0"),
        ({"recompute": True, "activation": "gru"}, "recompute: needs the backend fused, but it has no gru gates"),
        ({"recompute": True, "backend": "reference"}, "recompute: needs the backend fused, but the backend is refe"),
        ({"recompute_every": 0}, "recompute_every: expected None or an integer ≥ 1, got 0"),
        ({"init_gain": 0.0}, "init_gain: expected None or a number above 0, got 0.0"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrellisNet(**{"input_size": 3, "hidden_size": 5, "num_layers": 2} | options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("output_size", "output_size: expected 1 to hidden_size = 5, got 6"),
        ("kernel_size", "expected kernels of 6 taps"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_size_set_later_must_fit_the_kernels(backend, name, message):
    module = TrellisNet(3, 5, 2, backend=backend)
    setattr(module, name, 6)
    with pytest.raises(ValueError, match=message):
        module(torch.zeros(2, 7, 3))
    with pytest.raises(ValueError, match=message):
        module.init_stream(2)


@pytest.mark.parametrize("arguments", [{}, {"last_only": True}, {"lengths": [7, 3]}])
@pytest.mark.parametrize("options", [{}, {"backend": "reference"}, {"activation": "gru"}])
def test_an_input_in_16_bits_within_autocast_gives_float32(options, arguments):
    """Products round inputs of any dtype; cells and outputs keep the dtype of the weights."""
    torch.manual_seed(0)
    module, x, state = TrellisNet(3, 5, 4, init_gain=2.0, **options), torch.randn(2, 7, 3), torch.randn(2, 5)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for low, high in ((None, None), ((state.bfloat16(),) * 2, (state.bfloat16().float(),) * 2)):
            out = module(x.bfloat16(), low, **arguments)
            expected = module(x.bfloat16().float(), high, **arguments)
            for ours, theirs in ((out.output, expected.output), *zip(out.state, expected.state, strict=True)):
                assert ours.dtype == torch.float32
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x: expected \(N, L ≥ 1, 3\), got \(2, 3\)"),
        ({"x": torch.zeros(2, 7, 4)}, r"x: expected \(N, L ≥ 1, 3\), got \(2, 7, 4\)"),
        ({"x": torch.zeros(2, 0, 3)}, r"x: expected \(N, L ≥ 1, 3\), got \(2, 0, 3\)"),
        ({"state": (torch.zeros(2, 5), torch.zeros(2, 4))}, r"state c: expected \(2, 5\), got \(2, 4\)"),
        ({"state": (torch.zeros(2, 5),)}, r"state: expected \(h, c\), got 1 parts"),
        ({"aux_every": 0}, "aux_every: expected None or at least 1, got 0"),
        ({"aux_every": 2, "last_only": True}, "aux_every: expected None with last_only, got 2"),
        ({"masks": Masks(hidden=torch.ones(2, 4, 1))}, r"masks.hidden: expected shape \(2, 5, 1\), got \(2, 4, 1\)"),
        ({"masks": Masks(weight_h=torch.ones(20, 5, 2))}, r"masks.weight_h: expected shape \(20, 5, 1\)"),
    ],
)
def test_bad_inputs_are_named(arguments, message):
    arguments = {"x": x_of(dtype=torch.float32)} | arguments
    with pytest.raises(ValueError, match=message):
        net(dtype=torch.float32)(**arguments)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_dtypes_and_layouts_are_named(backend):
    module, x, state = net(dtype=torch.float32, backend=backend), torch.randn(2, 7, 3), torch.zeros(2, 5)
    stream = module.init_stream(2)
    weights = "expected float32, the dtype of the weights, got"
    for call, message in (
        (lambda: module(x.long()), rf"^x: {weights} int64; convert it with x.to\(torch.float32\), or embed ids first$"),
        (lambda: module(x.double()), rf"^x: {weights} float64; convert it with x.to\(torch.float32\), or the module"),
        (lambda: module(x.bfloat16()), rf"^x: {weights} bfloat16; "),
        (lambda: module(x, (state.double(), state)), rf"^state h: {weights} float64; "),
        (lambda: module.stream(x.double(), stream), rf"^x: {weights} float64; "),
        (lambda: module.step(x[:, 0].long(), stream), rf"^x_t: {weights} int64; "),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x.bfloat16()).output.isfinite().all()
        with pytest.raises(TypeError, match=f"^x: {weights} float64"):
            module(x.double())
    for call, message in (
        (lambda: module(x.mT), r"got \(2, 3, 7\); if that is \(N, channels, L\), pass x.transpose\(1, 2\)$"),
        (lambda: module(x[0]), r"got \(7, 3\); if that is a single sequence, pass x.unsqueeze\(0\)$"),
        (lambda: module(x.transpose(0, 1), (state, state)), r"x looks like \(L, N, …\), pass x.transpose\(0, 1\)$"),
        (lambda: module(x.transpose(0, 1), lengths=[3, 7]), r"x looks like \(L, N, …\), pass x.transpose\(0, 1\)$"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_low_precision_runs_and_stays_in_its_dtype():
    module, x = net(dtype=torch.float32, weight_norm=True), x_of(dtype=torch.float32)
    exact = module(x).output
    module.to(torch.bfloat16)
    out = module(x.bfloat16())
    assert out.output.dtype == out.state[1].dtype == torch.bfloat16
    assert_close(out.output.float(), exact, atol=0.05, rtol=0)


def test_wrapped_in_distributed_data_parallel_it_trains(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module, x = net(weight_norm=True, weight_dropout=0.3), x_of()
        plain = copy.deepcopy(module)
        wrapped = nn.parallel.DistributedDataParallel(module)
        for runner in (wrapped, plain):
            torch.manual_seed(0)
            runner(x).output.sum().backward()
        for a, b in zip(module.parameters(), plain.parameters(), strict=True):
            assert_close(a.grad, b.grad)
    finally:
        torch.distributed.destroy_process_group()
