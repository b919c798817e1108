"""Optimisers by name, and the authors' learning-rate rules."""

import pytest
import torch
from torch import nn

from trellisnet.errors import UserError
from trellisnet.training.config import RunConfig
from trellisnet.training.optim import Schedule, averaged, make_averaging, make_optimizer


def test_schedule_divides_on_a_plateau_above_the_floor():
    schedule = Schedule(20.0, anneal=2, factor=4.0, floor=0.02)
    rates = [schedule.step(i, loss) for i, loss in enumerate([5.0, 4.0, 4.5, 4.9, 4.1, 4.2, 3.0], start=1)]
    # "Older than 2 epochs" leaves 5.0 to epoch 4; from epoch 5 on it holds the 4.0 that epochs 5 and 6 exceed.
    assert rates == [20, 20, 20, 20, 5, 1.25, 1.25]
    low = Schedule(0.02, anneal=1, factor=4.0, floor=0.02, history=[1.0, 1.0])
    assert low.step(3, 9.0) == 0.02


def test_schedule_divides_by_ten_after_given_epochs():
    schedule = Schedule(1.0, when=[2, 3])
    assert [schedule.step(i, 1.0) for i in (1, 2, 3, 4)] == pytest.approx([1.0, 0.1, 0.01, 0.01])
    assert Schedule(1.0, when=[-1]).step(1, 1.0) == 1.0
    floored = Schedule(1e-5, when=[1], when_floor=1e-5)
    assert floored.step(1, 1.0) == 1e-5


def test_a_plateau_at_a_given_epoch_divides_once():
    schedule = Schedule(1.0, anneal=1, factor=10.0, when=[3], history=[1.0, 1.0])
    assert schedule.step(3, 2.0) == pytest.approx(0.1)


def test_weight_decay_and_rate_reach_the_optimiser():
    optimizer = make_optimizer([nn.Parameter(torch.zeros(1))], RunConfig(optim="Adam", lr=0.5, wdecay=0.1))
    assert isinstance(optimizer, torch.optim.Adam)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.5, 0.1)


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam", "Optimizer", "Sgd", "lr_scheduler"])
def test_optimisers_that_cannot_be_used_are_named(name):
    with pytest.raises(UserError, match=f"--optim {name}: .*use SGD or Adam"):
        make_optimizer([nn.Parameter(torch.zeros(1))], RunConfig(optim=name))


def test_schedule_switches_to_averaging_at_the_first_plateau_and_never_anneals_after_it():
    schedule = Schedule(20.0, anneal=1, factor=4.0, floor=0.02, when=[1, 5], asgd=True)
    rates = []
    for epoch, loss in enumerate([3.0, 2.0, 9.0, 9.0, 9.0], start=1):
        rates.append((schedule.step(epoch, loss), schedule.averaging))
    assert rates == [(2.0, False), (2.0, False), (20.0, True), (20.0, True), (20.0, True)]


def test_averaged_swaps_and_puts_back_also_after_an_error():
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = make_averaging([p], RunConfig(lr=1.0))
    seen = []
    for _ in range(3):
        p.grad = torch.ones(1)
        optimizer.step()
        seen.append(p.item())

    def interrupted_while_averaged():
        with averaged(optimizer):
            assert p.item() == pytest.approx(sum(seen[1:]) / 2)  # torch averages from the second iterate on
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_while_averaged()
    assert p.item() == seen[-1]
    with averaged(torch.optim.SGD([p], lr=1.0)):
        assert p.item() == seen[-1]
