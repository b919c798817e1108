"""The softmax head."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from trellisnet.heads import LinearSoftmax


def head():
    torch.manual_seed(0)
    module = LinearSoftmax(6, 11, dtype=torch.float64)
    nn.init.normal_(module.bias)
    return module, torch.randn(2, 5, 6, dtype=torch.float64), torch.randint(11, (2, 5))


def test_log_prob_is_a_distribution_over_the_classes():
    module, x, _ = head()
    expected = torch.log_softmax(x @ module.weight.T + module.bias, dim=-1)
    assert_close(module.log_prob(x), expected)
    assert_close(module.log_prob(x).exp().sum(-1), torch.ones(2, 5, dtype=torch.float64))


def test_loss_is_minus_the_targets_log_prob():
    module, x, target = head()
    expected = -module.log_prob(x).gather(-1, target[..., None])[..., 0]
    assert_close(module.loss(x, target, reduction="none"), expected)
    assert_close(module.loss(x, target, reduction="sum"), expected.sum())
    assert_close(module.loss(x, target), expected.mean())


def test_given_parameters_are_shared():
    embedding = nn.Embedding(11, 6)
    module = LinearSoftmax(6, 11, weight=embedding.weight)
    assert module.weight is embedding.weight
    assert module.bias.abs().sum() == 0


def test_bad_input_is_named():
    module, x, target = head()
    with pytest.raises(ValueError, match="reduction: expected one of mean, sum, none, got 'max'"):
        module.loss(x, target, reduction="max")
    with pytest.raises(ValueError, match=r"target: expected shape \(2, 5\), got \(2, 4\)"):
        module.loss(x, target[:, :4])
    with pytest.raises(ValueError, match=r"weight: expected shape \(11, 6\), got \(11, 5\)"):
        LinearSoftmax(6, 11, weight=nn.Parameter(torch.zeros(11, 5)))
