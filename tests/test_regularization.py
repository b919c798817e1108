"""Dropouts, DropConnect, weight normalisation and penalties."""

import pytest
import torch
from torch.testing import assert_close

from trellisnet.regularization import (
    Masks,
    activation_regularization,
    check_rate,
    drop_connect,
    dropout_scale,
    temporal_activation_regularization,
    weight_norm,
)


def test_scale_is_zero_or_one_over_keep():
    torch.manual_seed(0)
    scale = dropout_scale(torch.zeros(1), (400, 50, 1), 0.3, True, None, "hidden")
    assert scale.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (scale == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)


def test_nothing_is_dropped_in_evaluation_or_at_rate_zero():
    assert dropout_scale(torch.zeros(1), (2,), 0.3, False, None, "hidden") is None
    assert dropout_scale(torch.zeros(1), (2,), 0.0, True, None, "hidden") is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float64])
def test_explicit_masks_of_any_dtype_replace_drawing(dtype):
    state = torch.get_rng_state()
    masks = Masks(hidden=torch.tensor([1, 0]).to(dtype))
    for training in (True, False):
        assert_close(dropout_scale(torch.zeros(1), (2,), 0.5, training, masks, "hidden"), torch.tensor([2.0, 0.0]))
        assert dropout_scale(torch.zeros(1), (2,), 0.5, training, masks, "output") is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("k", [2, 3])
def test_temporal_drop_connect_never_drops_the_newest_tap(k):
    torch.manual_seed(0)
    weight = torch.ones(64, 32, k)
    dropped = drop_connect(weight, 0.5, True, True, None, "weight_h")
    assert torch.equal(dropped[:, :, -1], weight[:, :, -1])
    for tap in range(k - 1):
        assert (dropped[:, :, tap] == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    whole = drop_connect(weight, 0.5, False, True, None, "weight_h")
    assert (whole[:, :, -1] == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert drop_connect(weight, 0.5, False, False, None, "weight_h") is weight


def test_weight_norm_keeps_the_norm_of_a_dropped_row():
    torch.manual_seed(0)
    v, g = torch.randn(8, 5, 2, dtype=torch.float64), torch.randn(8, 1, 1, dtype=torch.float64)
    dropped = drop_connect(v, 0.5, True, True, None, "weight_h")
    norm = torch.linalg.vector_norm(weight_norm(dropped, g), dim=(1, 2), keepdim=True)
    assert_close(norm, g.abs())


def test_weight_norm_equals_torchs():
    torch.manual_seed(0)
    v = torch.randn(8, 5, 2, dtype=torch.float64, requires_grad=True)
    g = torch.randn(8, 1, 1, dtype=torch.float64, requires_grad=True)
    assert_close(weight_norm(v, g), torch._weight_norm(v, g, 0))
    assert torch.autograd.gradcheck(weight_norm, (v, g))


def test_a_row_that_is_dropped_entirely_is_zero_and_has_finite_gradients():
    v = torch.ones(2, 1, 2, requires_grad=True)
    g = torch.ones(2, 1, 1, requires_grad=True)
    mask = torch.tensor([[[0, 0]], [[1, 0]]])
    w = weight_norm(drop_connect(v, 0.5, False, True, Masks(weight_x=mask), "weight_x"), g)
    assert w.flatten().tolist() == [0, 0, 1, 0]
    w.sum().backward()
    assert torch.isfinite(v.grad).all()
    assert torch.isfinite(g.grad).all()


def test_penalties():
    output = torch.tensor([[[1.0], [3.0], [2.0]]])
    assert activation_regularization(output, 2.0).item() == pytest.approx(2 * 14 / 3)
    assert temporal_activation_regularization(output, 3.0).item() == pytest.approx(3 * (4 + 1) / 2)
    assert temporal_activation_regularization(output[:, :1], 3.0).item() == 0


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_rates_are_probabilities(p):
    with pytest.raises(ValueError, match=r"wdrop: expected a probability in \[0, 1\)"):
        check_rate("wdrop", p)
