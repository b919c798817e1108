"""Theorem 1: truncated recurrent networks and the trellis networks converted from them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from tests.cases import load, names
from trellisnet.data import PROJECT
from trellisnet.data.corpus import batchify
from trellisnet.theorem1 import from_lstm, from_rnn

CONVERT = {nn.RNN: from_rnn, nn.LSTM: from_lstm}
KINDS = [pytest.param(kind, id=kind.__name__) for kind in CONVERT]


def network(kind, num_layers, **options):
    torch.manual_seed(num_layers)
    return kind(3, 4, num_layers, batch_first=True, dtype=torch.float64, **{"bias": False, **options})


def truncated(network, x, horizon):
    """Return outputs of the network, restarted for every time step `horizon` inputs before it."""
    return torch.cat([network(x[:, max(t - horizon + 1, 0) : t + 1])[0][:, -1:] for t in range(x.size(1))], dim=1)


@pytest.mark.parametrize("name", names("theorem1"))
def test_fixtures(name):
    case = load(name)
    config = case.meta["config"]
    kind = {"rnn": nn.RNN, "lstm": nn.LSTM}[config["network"]]
    sizes = (config["input_size"], config["hidden_size"], config["num_layers"])
    rnn = kind(*sizes, bias=False, batch_first=True, dtype=torch.float64)
    rnn.load_state_dict({key: case.arrays[key] for key in rnn.state_dict()})
    x, (horizon, L) = case.arrays["x"], (config["horizon_M"], config["num_layers"])

    trellis = CONVERT[kind](rnn, horizon)
    assert (trellis.num_layers, trellis.hidden_size) == (horizon + L - 1, L * config["hidden_size"])
    assert_close(trellis(x).output, case.arrays["y_trunc"], atol=1e-12, rtol=1e-12)
    assert_close(CONVERT[kind](rnn, x.size(1))(x).output, case.arrays["y_full"], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("horizon", [1, 2, 5, 11])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_truncated_network(kind, num_layers, horizon):
    rnn, x = network(kind, num_layers), torch.randn(2, 11, 3, dtype=torch.float64)
    trellis = CONVERT[kind](rnn, horizon)
    assert_close(trellis(x).output, truncated(rnn, x, horizon), atol=1e-13, rtol=0)
    assert trellis.receptive_field == horizon + 1  # the past tap of x, which is zero here, reaches one further
    assert_close(trellis(x, last_only=True).output, rnn(x[:, -horizon:])[0][:, -1:], atol=1e-13, rtol=0)
    if horizon == 11:
        assert_close(trellis(x).output, rnn(x)[0], atol=1e-13, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_has_the_weights_of_the_network_and_a_zero_tap(kind):
    rnn = network(kind, 3)
    trellis = CONVERT[kind](rnn, 2)
    kernels = sum(p.numel() for name, p in trellis.named_parameters() if name != "bias")
    assert kernels == sum(p.numel() for p in rnn.parameters()) + rnn.weight_ih_l0.numel()
    assert trellis.weight_x[:, :, 0].abs().max() == trellis.bias.abs().max() == 0


def test_the_inner_layers_are_networks_started_later():
    """Eq. 6: group i of layer j is layer i of the network started at t − j + i."""
    rnn, x = network(nn.RNN, 3), torch.randn(1, 9, 3, dtype=torch.float64)
    for j in range(1, 7):
        trellis = from_rnn(rnn, 1)
        trellis.num_layers, trellis.output_size = j, 12
        groups = trellis(x).output.chunk(3, dim=2)
        for i in range(1, 4):
            if i > j:
                assert groups[i - 1].abs().max() == 0
                continue
            part = nn.RNN(3, 4, i, bias=False, batch_first=True, dtype=torch.float64)
            part.load_state_dict({name: rnn.state_dict()[name] for name in part.state_dict()})
            assert_close(groups[i - 1], truncated(part, x, j - i + 1), atol=1e-13, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_may_have_biases(kind):
    rnn, x = network(kind, 1, bias=True), torch.randn(2, 11, 3, dtype=torch.float64)
    trellis = CONVERT[kind](rnn, 5)
    expected = truncated(rnn, x, 5)
    assert_close(trellis(x).output[:, 5:], expected[:, 5:], atol=1e-13, rtol=0)
    assert_close(trellis(x).output[:, :5], expected[:, :5], atol=1e-13, rtol=0)  # every layer is padded with zeros


def test_with_biases_deeper_networks_would_be_wrong():
    """Why they are refused: layers that have not started yet are not zero."""
    rnn, x = network(nn.RNN, 2), torch.randn(1, 9, 3, dtype=torch.float64)
    trellis = from_rnn(rnn, 4)
    with torch.no_grad():
        trellis.bias.fill_(0.5)
    shifted = nn.RNN(3, 4, 2, batch_first=True, dtype=torch.float64)
    shifted.load_state_dict(
        {**rnn.state_dict(), **{f"bias_{a}h_l{i}": torch.full((4,), 0.25).double() for a in "ih" for i in (0, 1)}}
    )
    assert (trellis(x).output - truncated(shifted, x, 4)).abs().max() > 1e-3


@pytest.mark.parametrize("batch_first", [False, True])
def test_keeps_dtype_and_shares_nothing(batch_first):
    rnn = nn.LSTM(3, 4, 2, bias=False, batch_first=batch_first)
    trellis = from_lstm(rnn, 3)
    assert trellis.weight_x.dtype == torch.float32
    x = torch.randn(2, 3, 3)
    before = trellis(x).output
    expected = rnn(x)[0] if batch_first else rnn(x.transpose(0, 1))[0].transpose(0, 1)
    assert_close(before, expected, atol=1e-6, rtol=0)
    with torch.no_grad():
        rnn.weight_hh_l1.zero_()
    assert torch.equal(trellis(x).output, before)
    before.sum().backward()
    assert all(p.grad is not None for p in trellis.parameters())


@pytest.mark.parametrize(
    ("make", "horizon", "message"),
    [
        (lambda: nn.LSTM(3, 4, 2), 5, "with 2 layers Theorem 1 holds only without biases"),
        (lambda: nn.RNN(3, 4, 3), 5, "with 3 layers Theorem 1 holds only without biases"),
        (lambda: nn.RNN(3, 4, bias=False, nonlinearity="relu"), 5, "no relu activation"),
        (lambda: nn.LSTM(3, 4, bias=False, bidirectional=True), 5, "cannot read backwards"),
        (lambda: nn.LSTM(3, 4, bias=False, proj_size=2), 5, "proj_size: expected 0, got 2"),
        (lambda: nn.LSTM(3, 4, bias=False), 0, "horizon: expected an integer of at least 1, got 0"),
    ],
)
def test_networks_without_an_equal_trellis_are_refused(make, horizon, message):
    rnn = make()
    with pytest.raises(ValueError, match=message):
        CONVERT[type(rnn)](rnn, horizon)


def test_another_module_is_refused():
    with pytest.raises(ValueError, match=r"expected an nn.LSTM, got GRU"):
        from_lstm(nn.GRU(3, 4), 2)
    with pytest.raises(ValueError, match=r"expected an nn.RNN, got Linear"):
        from_rnn(nn.Linear(3, 4), 2)


@pytest.mark.skipif(not (PROJECT / "data" / "penn" / "train.txt").exists(), reason="needs data/penn")
def test_a_trained_lstm_on_real_text():
    """A small character model trained on Penn Treebank has the same test score as an LSTM and as a trellis."""
    text = (PROJECT / "data" / "penn" / "train.txt").read_text()[:200_000]
    held_out = (PROJECT / "data" / "penn" / "test.txt").read_text()[:4_001]
    symbols = sorted(set(text + held_out))
    train, test = (torch.tensor([symbols.index(s) for s in part]) for part in (text, held_out))
    V, horizon, window = len(symbols), 40, 50
    torch.manual_seed(0)
    embedding, head = nn.Embedding(V, 16), nn.Linear(32, V)
    lstm = nn.LSTM(16, 32, 2, bias=False, batch_first=True)
    modules = nn.ModuleList([embedding, lstm, head])
    optimiser = torch.optim.Adam(modules.parameters(), 1e-2)
    rows = batchify(train, 32)
    for start in range(0, 120 * window, window):
        inputs, targets = rows[:, start : start + window], rows[:, start + 1 : start + window + 1]
        optimiser.zero_grad()
        F.cross_entropy(head(lstm(embedding(inputs))[0]).flatten(0, 1), targets.flatten()).backward()
        optimiser.step()

    modules.double()
    trellis = from_lstm(lstm, horizon)
    windows = test[:-1].view(1, -1).unfold(1, horizon, 1)[0]  # every window of the last `horizon` symbols
    targets = test[horizon:]
    with torch.no_grad():
        expected = lstm(embedding(windows))[0][:, -1]  # the truncated LSTM, one window at a time
        output = trellis(embedding(test[None, :-1])).output[0, horizon - 1 :]  # the trellis, all at once
        losses = [F.cross_entropy(head(out), targets).item() for out in (expected, output)]
    assert_close(output, expected, atol=1e-12, rtol=0)
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    assert losses[0] < 2.4  # it has learnt something: a uniform guess costs log V ≈ 3.9
