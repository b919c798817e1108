"""Cores in both directions, and a TrellisNet in place of `torch.nn.LSTM`."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

from trellisnet import Bidirectional, TrellisLSTM, TrellisNet
from trellisnet.baselines import AWDLSTM, RHN, TCN, SparseStack
from trellisnet.baselines.lstm import WeightDropLSTM
from trellisnet.ops import hide_padding
from trellisnet.wrappers import both_ways, reverse

CORES = {
    "trellisnet": TrellisNet,
    "reference": functools.partial(TrellisNet, backend="reference"),
    "gru": functools.partial(TrellisNet, activation="gru"),
    "awd-lstm": AWDLSTM,
    "rhn": RHN,
    "tcn": TCN,
    "sparse": SparseStack,
}
LENGTHS = torch.tensor([3, 7, 1])


def test_rows_are_reversed_from_their_own_ends():
    x = torch.arange(12.0).view(2, 6, 1)
    assert reverse(x).squeeze().tolist() == [[5, 4, 3, 2, 1, 0], [11, 10, 9, 8, 7, 6]]
    lengths = torch.tensor([4, 1])
    assert reverse(x, lengths).squeeze().tolist() == [[3, 2, 1, 0, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert torch.equal(reverse(reverse(x, lengths), lengths), x)


@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
def test_a_padded_batch_equals_its_rows(core):
    torch.manual_seed(0)
    model = Bidirectional(core, 3, 4, 3)
    x = torch.randn(3, 7, 3)
    expected = [model(x[i : i + 1, :n]) for i, n in enumerate(LENGTHS.tolist())]
    for fill in (0, math.nan):
        for lengths in (LENGTHS, LENGTHS.tolist()):
            output, state, aux = model(hide_padding(x, LENGTHS, fill), lengths=lengths)
            assert output.shape == (3, 7, model.output_size) == (3, 7, 8)
            assert aux == []
            for i, one in enumerate(expected):
                assert_close(output[i, : LENGTHS[i]], one.output[0])
                for ours, theirs in zip(state, one.state, strict=bool(state)):
                    assert_close(ours[i], theirs[0])
    assert bool(state) == (core not in (AWDLSTM, RHN, TCN, SparseStack))


@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
def test_each_half_of_the_channels_reads_its_own_side(core):
    model, x = Bidirectional(core, 3, 4, 3), torch.randn(2, 6, 3, requires_grad=True)
    output = model(x).output
    for half, sees in ((output[..., :4], slice(0, 4)), (output[..., 4:], slice(3, 6))):
        (gradient,) = torch.autograd.grad(half[:, 3].sum(), x, retain_graph=True)
        unseen = torch.ones(6, dtype=torch.bool)
        unseen[sees] = False
        assert gradient[:, 3].abs().min() > 0
        assert gradient[:, unseen].abs().max() == 0


def test_output_and_state_are_ordered_as_those_of_a_bidirectional_lstm():
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 4, batch_first=True, bidirectional=True)
    ours = [WeightDropLSTM(3, 4) for _ in range(2)]
    for layer, suffix in zip(ours, ("", "_reverse"), strict=True):
        layer.load_state_dict({name: getattr(lstm, name + suffix) for name, _ in layer.named_parameters()})
    x, hx = torch.randn(3, 7, 3), torch.randn(2, 2, 3, 4)
    output, (h, c) = lstm(x, tuple(hx))
    out = both_ways(*ours, x, (hx[0, 0], hx[1, 0], hx[0, 1], hx[1, 1]))
    assert_close(out.output, output)
    assert_close(out.state, (h[0], c[0], h[1], c[1]))
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    padded, _ = pad_packed_sequence(lstm(packed)[0], batch_first=True)
    assert_close(hide_padding(both_ways(*ours, x, lengths=LENGTHS).output, LENGTHS), padded)


def test_both_directions_are_trained_and_have_parameters_of_their_own():
    model = Bidirectional(TrellisNet, 3, 4, 2, output_size=2)
    assert not torch.equal(model.forwards.weight_h_v, model.backwards.weight_h_v)
    model(torch.randn(2, 5, 3), lengths=[5, 2]).output.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match=r"^x: expected \(N, L ≥ 1, 3\), got \(2, 5, 4\)"):
        model(torch.randn(2, 5, 4))


# -- in the place of nn.LSTM -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_shapes_are_those_of_an_lstm_of_one_layer(batch_first, bidirectional):
    options = {"batch_first": batch_first, "bidirectional": bidirectional}
    ours, theirs = TrellisLSTM(3, 4, 5, **options), nn.LSTM(3, 4, 1, **options)
    x = torch.randn(3, 7, 3) if batch_first else torch.randn(7, 3, 3)
    batches = [x, torch.randn(7, 3), pack_padded_sequence(x, LENGTHS, batch_first=batch_first, enforce_sorted=False)]
    batches.append(pack_padded_sequence(x, torch.tensor([7, 7, 2]), batch_first=batch_first))
    for batch in batches:
        output, hx = ours(batch)
        expected, state = theirs(batch)
        assert [part.shape for part in hx] == [part.shape for part in state]
        if isinstance(batch, torch.Tensor):
            assert output.shape == expected.shape
        else:
            assert output.data.shape == expected.data.shape
            assert torch.equal(output.batch_sizes, expected.batch_sizes)
            for name in ("sorted_indices", "unsorted_indices"):
                ours_at, theirs_at = getattr(output, name), getattr(expected, name)
                assert (ours_at is None and theirs_at is None) or torch.equal(ours_at, theirs_at)
        again, _ = ours(batch, hx)
        assert type(again) is type(output)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_unbatched_and_padded_input_agree(bidirectional):
    torch.manual_seed(0)
    model = TrellisLSTM(3, 4, 5, batch_first=True, bidirectional=bidirectional)
    x, hx = torch.randn(3, 7, 3), tuple(torch.randn(2, 1 + bidirectional, 3, 4))
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    output, state = model(packed, hx)
    output, lengths = pad_packed_sequence(output, batch_first=True)
    assert torch.equal(lengths, LENGTHS)
    for i, n in enumerate(LENGTHS.tolist()):
        alone, alone_state = model(x[i, :n], tuple(part[:, i] for part in hx))
        assert_close(output[i, :n], alone)
        assert_close(tuple(part[:, i] for part in state), alone_state)


def test_it_is_a_trellis():
    torch.manual_seed(0)
    model = TrellisLSTM(3, 4, 5)
    x, (h, c) = torch.randn(7, 2, 3), (torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    output, state = model(x, (h, c))
    out = model.core(x.transpose(0, 1), (h[0], c[0]))
    assert_close(output, out.output.transpose(0, 1))
    assert_close(state, tuple(part.unsqueeze(0) for part in out.state))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in TrellisLSTM(3, 4, 50).parameters())


@pytest.mark.parametrize("bidirectional", [False, True])
def test_its_receptive_field_is_finite(bidirectional):
    torch.manual_seed(0)
    model = TrellisLSTM(3, 4, 4, bidirectional=bidirectional, init_gain=2.0)
    x = torch.randn(12, 1, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x)[0][-1, :, :4].sum(), x)
    assert model.receptive_field == 5
    assert gradient.abs().amax((1, 2)).gt(0).tolist() == [False] * 7 + [True] * 5
    lstm = nn.LSTM(3, 4, bidirectional=bidirectional)
    (gradient,) = torch.autograd.grad(lstm(x)[0][-1, :, :4].sum(), x)
    assert gradient.abs().amax((1, 2)).gt(0).all()
    with pytest.raises(TypeError, match="num_layers"):
        TrellisLSTM(3, 4)


def test_two_calls_are_not_one_long_call_except_in_an_lstm():
    torch.manual_seed(0)
    x = torch.randn(8, 2, 3)
    for model, equal in ((TrellisLSTM(3, 4, 4, init_gain=2.0), False), (nn.LSTM(3, 4), True)):
        whole, _ = model(x)
        _, hx = model(x[:4])
        assert torch.allclose(model(x[4:], hx)[0], whole[4:], atol=1e-6) == equal


def test_dropout_acts_in_training_only_and_leaves_the_output_whole():
    torch.manual_seed(0)
    model, x = TrellisLSTM(3, 40, 2, dropout=0.5, init_gain=2.0), torch.randn(7, 2, 3)
    assert not torch.equal(model(x)[0], model(x)[0])
    assert (model(x)[0] != 0).all()
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_depth_and_dropout_can_be_changed(bidirectional):
    """As in `nn.LSTM`, where `dropout` is read in every call."""
    torch.manual_seed(0)
    x, options = torch.randn(7, 2, 3), {"bidirectional": bidirectional, "init_gain": 2.0}
    model, shallow = TrellisLSTM(3, 8, 4, dropout=0.5, **options), TrellisLSTM(3, 8, 2, **options)
    shallow.load_state_dict(model.state_dict())
    assert (model.num_layers, model.dropout) == (4, 0.5)
    model.num_layers, model.dropout = 2, 0.0
    assert (model.num_layers, model.dropout, model.receptive_field) == (2, 0.0, 3)
    assert torch.equal(model(x)[0], shallow(x)[0])


def test_wrong_input_is_refused():
    model = TrellisLSTM(3, 4, 2, batch_first=True)
    with pytest.raises(TypeError, match="^input: expected a tensor, got list$"):
        model([[1.0]])
    with pytest.raises(ValueError, match=r"^hx h: expected \(1, 2, 4\), got \(2, 4\)"):
        model(torch.randn(2, 5, 3), (torch.randn(2, 4), torch.randn(2, 4)))
    with pytest.raises(ValueError, match=r"^hx: expected \(h, c\), got 1 parts$"):
        model(torch.randn(2, 5, 3), torch.randn(1, 2, 4))  # as of a GRU
    with pytest.raises(ValueError, match=r"^input: expected 2 or 3 dimensions, got \(3,\)$"):
        TrellisLSTM(3, 4, 2)(torch.randn(3))
    with pytest.raises(TypeError, match="bias"):
        TrellisLSTM(3, 4, 2, bias=False)
