"""Optimisers by name, and the authors' learning-rate rules."""

import functools
import math
import signal

import pytest
import torch
from torch import nn

from trellisnet.errors import UserError
from trellisnet.training.config import RunConfig
from trellisnet.training.interrupts import Interrupted, Interrupts
from trellisnet.training.optim import (
    EMA,
    Curve,
    Schedule,
    averaged,
    averages,
    make_averaging,
    make_optimizer,
    make_schedule,
)


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


def test_an_epoch_without_a_loss_is_no_plateau_nor_the_best():
    schedule = Schedule(1.0, anneal=1, when=[2])
    losses = ((1, 2.0), (2, math.nan), (3, 1.0), (4, 0.5))
    assert [schedule.step(epoch, loss) for epoch, loss in losses] == [1.0, 0.1, 0.1, 0.1]
    assert schedule.history == [2.0, 1.0, 0.5]


def test_weight_decay_and_rate_reach_the_optimiser():
    optimizer = make_optimizer([nn.Parameter(torch.zeros(1))], RunConfig(optim="Adam", lr=0.5, wdecay=0.1))
    assert isinstance(optimizer, torch.optim.Adam)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.5, 0.1)


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam", "Optimizer", "Sgd", "lr_scheduler"])
def test_optimisers_that_cannot_be_used_are_named(name):
    with pytest.raises(UserError, match=f"--optim {name}: .*use SGD or Adam"):
        make_optimizer([nn.Parameter(torch.zeros(1))], RunConfig(optim=name))


@pytest.mark.parametrize(
    ("optim", "numbers", "reason"),
    [
        ("Adam", {"lr": 1e38}, "lr 1e+38, weight_decay 0 .*without overflow"),
        ("SGD", {"wdecay": 1e38, "lr": 10.0}, "weight_decay 1e+38 .*not a finite number"),
        ("Adam", {"momentum": 0.5}, "momentum 0.5 .*momentum"),
        ("Rprop", {}, "weight_decay"),
    ],
)
def test_numbers_that_an_optimiser_cannot_take_are_named(optim, numbers, reason):
    with pytest.raises(UserError, match=f"--optim {optim}: does not work with .*{reason.replace('+', '.')}") as raised:
        make_optimizer([nn.Parameter(torch.zeros(1))], RunConfig(optim=optim, **numbers))
    assert "\n" not in str(raised.value)


def test_trying_an_optimiser_leaves_the_weights():
    weights = nn.Parameter(torch.full((2, 2), 3.0))
    names = ("SGD", "Adam", "RMSprop", "ASGD", "Muon")  # torch 2.6 does not have the last
    for name in filter(functools.partial(hasattr, torch.optim), names):
        assert not make_optimizer([weights], RunConfig(optim=name, lr=0.5)).state
    assert torch.equal(weights, torch.full((2, 2), 3.0))


def test_schedule_switches_to_averaging_at_the_first_plateau_and_never_anneals_after_it():
    schedule = Schedule(20.0, anneal=1, factor=4.0, floor=0.02, when=[1, 5], asgd=True)
    rates = []
    for epoch, loss in enumerate([3.0, 2.0, 9.0, 9.0, 9.0], start=1):
        rates.append((schedule.step(epoch, loss), schedule.averaging))
    assert rates == [(2.0, False), (2.0, False), (20.0, True), (20.0, True), (20.0, True)]
    low = Schedule(0.01, anneal=1, factor=4.0, floor=0.02, asgd=True)  # the floor is one of annealing
    rates = [(low.step(epoch, loss), low.averaging) for epoch, loss in enumerate([3.0, 2.0, 9.0], start=1)]
    assert rates == [(0.01, False), (0.01, False), (0.01, True)]


@pytest.mark.parametrize(("min_epochs", "last"), [(0, 5), (5, 5), (6, 6), (7, 8)])
def test_finetuning_ends_at_the_first_plateau_after_the_least_number_of_epochs(min_epochs, last):
    """With a patience of 2, the fifth loss is the first that exceeds one from before the two epochs preceding it."""
    losses = [4.0, 3.0, 3.5, 4.0, 3.2, 3.1, 2.9, 3.3, 3.3]
    schedule = Schedule(30.0, anneal=2, floor=40.0, when=[1], finetune=True, min_epochs=min_epochs)
    assert schedule.averaging
    for epoch, loss in enumerate(losses, start=1):
        assert not schedule.ended
        assert schedule.step(epoch, loss) == 30.0
        if epoch == last:
            break
    assert schedule.ended
    again = Schedule(30.0, anneal=2, finetune=True, min_epochs=min_epochs)
    again.load_state_dict(schedule.state_dict())
    assert again.ended
    assert not Schedule(30.0, anneal=2, asgd=True, averaging=True, history=losses[:last]).ended


def test_averaged_swaps_and_restores_even_after_an_error():
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = make_averaging([p], RunConfig(lr=1.0))
    seen = []
    for _ in range(3):
        p.grad = torch.ones(1)
        optimizer.step()
        seen.append(p.item())

    def interrupted_while_averaged():
        with averaged(averages(optimizer)):
            assert p.item() == pytest.approx(sum(seen[1:]) / 2)  # torch averages from the second iterate on
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_while_averaged()
    assert p.item() == seen[-1]
    with averaged(averages(torch.optim.SGD([p], lr=1.0))):
        assert p.item() == seen[-1]


def test_a_signal_before_the_weights_are_put_back_leaves_no_averages():
    """The checkpoint of the interruption would hold them as the weights to train on with."""
    p, calls = nn.Parameter(torch.tensor([1.0])), []
    with Interrupts() as interrupts:

        def held():
            calls.append(p.item())
            if len(calls) == 2:
                signal.raise_signal(signal.SIGINT)
            return interrupts.held()

        with pytest.raises(Interrupted), averaged([(p, torch.tensor([5.0]))], held):
            pass
    assert (calls, p.item()) == ([1.0, 5.0], 1.0)


def rates_of_torch(make, updates, lr):
    """The rates that a scheduler of torch sets in the optimiser it drives."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, rates = make(optimizer), []
    for _ in range(updates):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def half_cosine(share):
    return (1 + math.cos(math.pi * share)) / 2


def test_schedules_over_the_run_are_those_of_torch():
    rules, lr, T = torch.optim.lr_scheduler, 0.02, 40
    expected = {
        ("step", 4): [lr * min((n + 1) / 5, 1) for n in range(T)],
        ("cosine", 0): rates_of_torch(lambda o: rules.CosineAnnealingLR(o, T), T, lr),
        ("cosine", 4): [lr * ((n + 1) / 5 if n < 4 else half_cosine((n - 4) / (T - 4))) for n in range(T)],
        ("onecycle", 0): rates_of_torch(lambda o: rules.OneCycleLR(o, lr, T, cycle_momentum=False), T, lr),
        ("onecycle", 10): [
            lr / 25 + lr * (1 - 1 / 25) * (1 - half_cosine(n / 9)) if n < 10
            else lr / 25e4 + lr * (1 - 1 / 25e4) * half_cosine((n - 9) / 30) for n in range(T)
        ],
    }  # fmt: skip
    for (name, warmup), rates in expected.items():
        config = RunConfig(schedule=name, warmup=warmup, lr=lr, epochs=4, when=[99])
        schedule = make_schedule(config, lambda epoch: 7 + 2 * epoch)  # 7 + 9 + 11 + 13 updates
        assert [schedule.rate(n) for n in range(T)] == pytest.approx(rates, rel=1e-9, abs=1e-12), (name, warmup)
        assert schedule.step(1, 5.0) == lr
    shorter = make_schedule(RunConfig(schedule="cosine", lr=lr, epochs=4, max_steps=10), lambda _: 10)
    assert [shorter.rate(n) for n in range(10)] == pytest.approx([lr * half_cosine(n / 10) for n in range(10)])


@pytest.mark.parametrize(("name", "warmup"), [("step", 5), ("cosine", 0), ("cosine", 5), ("onecycle", 5)])
def test_a_curve_continues_from_any_update_bit_equal(name, warmup):
    whole = Curve(name, warmup, 30)
    factors = [whole.factor(n) for n in range(30)]
    assert len(set(factors)) > 5
    for start in (0, 3, 5, 6, 21, 29):
        curve = Curve(name, warmup, 30)
        assert [curve.factor(n) for n in range(start, 30)] == factors[start:]


def test_rules_after_epochs_belong_to_step_alone():
    config = RunConfig(schedule="onecycle", lr=1.0, epochs=2)
    schedule = make_schedule(config, lambda _: 10, anneal=1, asgd=True)
    for epoch in (1, 2, 3):
        assert schedule.step(epoch, float(epoch)) == 1.0
    assert not schedule.averaging
    assert make_schedule(RunConfig(lr=1.0, when=[1]), lambda _: 10).step(1, 1.0) == 0.1


@pytest.mark.parametrize("name", ["cosine", "onecycle"])
def test_a_warm_up_that_fills_the_run_is_refused(name):
    config = RunConfig(schedule=name, warmup=20, epochs=2)
    with pytest.raises(UserError, match=f"--warmup 20: --schedule {name} needs fewer than the run's 20 updates"):
        make_schedule(config, lambda _: 10)
    make_schedule(RunConfig(schedule=name, warmup=19, epochs=2), lambda _: 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosine", "when": [3]}, "--when: has no effect with --schedule cosine"),
        ({"schedule": "onecycle", "decay": 2.0}, "--decay: has no effect with --schedule onecycle"),
        ({"schedule": "onecycle", "warmup": 1}, "--warmup 1: with --schedule onecycle expected 0 or at least 2"),
        ({"warmup": -1}, "--warmup: expected at least 0, got -1"),
        ({"ema": 1.0}, r"--ema: expected a share in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, r"--label_smoothing: expected a share in \[0, 1\), got -0.1"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        RunConfig(**settings).validate()


def test_a_moving_average_equals_one_computed_by_hand():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(3, dtype=torch.float64)), nn.Parameter(torch.randn(2, 2, dtype=torch.float64))]
    ema, optimizer, expected = EMA(weights, 0.9), torch.optim.SGD(weights, lr=0.3), None
    assert averages(optimizer, ema) == []
    for _ in range(5):
        for p in weights:
            p.grad = torch.randn_like(p)
        optimizer.step()
        ema.update()
        now = [p.detach().clone() for p in weights]
        expected = now if expected is None else [0.9 * a + 0.1 * p for a, p in zip(expected, now, strict=True)]
    with averaged(averages(optimizer, ema)):
        assert all(torch.allclose(p, a, rtol=1e-14) for p, a in zip(weights, expected, strict=True))
        assert not any(torch.allclose(p, a) for p, a in zip(weights, now, strict=True))
    assert all(torch.equal(p, a) for p, a in zip(weights, now, strict=True))
