"""The neural cache, against the definition written out token by token."""

import math

import pytest
import torch

from test_dynamic import MODELS, V, make, text
from trellisnet.evaluation import cache
from trellisnet.evaluation.cache import Cache, collect, evaluate, log_prob, tune
from trellisnet.models import TrellisLanguageModel
from trellisnet.training.tasks import LanguageModeling


def by_hand(task, rows, window, theta, weight):
    """Grave et al. as in AWD-LSTM's `pointer`: full distributions, position by position."""
    model, total, tokens = task.model.eval(), 0.0, 0
    windows = task.evaluation_windows
    skip = windows.context
    with torch.no_grad():
        for row in rows:
            features, log_ps, targets, state = [], [], [], None
            for _, inputs, following in task.windows(row.unsqueeze(0), training=False):
                out = model(inputs, state)
                state = out.state if windows.carried else None
                features += out.output[0, skip:].unbind()
                log_ps += model.log_prob(out.output[:, skip:])[0].unbind()
                targets += following[0, skip:].tolist()
            for t, target in enumerate(targets):
                p = log_ps[t].exp()
                if t > window:
                    a = torch.stack([theta * features[j] @ features[t] for j in range(t - window, t)]).softmax(0)
                    cached = torch.zeros(V, dtype=p.dtype)
                    for share, j in zip(a, range(t - window, t), strict=True):
                        cached[targets[j]] += share
                    assert cached.sum().item() == pytest.approx(1)
                    p = weight * cached + (1 - weight) * p
                total -= math.log(p[target])
                tokens += 1
    return total / tokens, tokens


@pytest.mark.parametrize("repackage", [True, False], ids=["carried", "history"])
@pytest.mark.parametrize(("head", "core"), MODELS)
def test_the_definition(head, core, repackage):
    task, rows = make(head, core, repackage), text(2, 50)
    past = collect(task, rows)
    for window, theta, weight in ((7, 2.0, 0.3), (1, 0.5, 0.9), (33, 5.0, 0.5)):
        loss, tokens = by_hand(task, rows, window, theta, weight)
        found = evaluate(past, Cache(window, theta, weight))
        assert found["tokens"] == tokens
        assert found["loss"] == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("repackage", [True, False], ids=["carried", "history"])
@pytest.mark.parametrize(("head", "core"), MODELS)
def test_with_a_share_of_zero_the_score_is_static(head, core, repackage):
    task, rows = make(head, core, repackage, torch.float32), text(3, 50)
    task.model.train()
    static = task.evaluate(rows)
    found = evaluate(collect(task, rows), Cache(5, 1.0, 0.0))
    assert task.model.training
    assert found["tokens"] == static["tokens"]
    if head == "split":
        assert found["loss"] == pytest.approx(static["loss"], rel=1e-6)
    else:
        assert found["loss"] == static["loss"]


def test_a_stream_and_a_part_of_the_text():
    torch.manual_seed(2)
    model = TrellisLanguageModel(V, 6, 8, 3, output_size=6)
    task, rows = LanguageModeling(model, horizon=4, seq_len=9), text(2, 3000)
    assert task.streams(task.evaluation_windows)
    for limit in (None, 200):
        static = task.evaluate(rows, max_tokens=limit)
        past = collect(task, rows, max_tokens=limit)
        assert evaluate(past, Cache(50, 1.0, 0.0)) == static
        assert past.features.shape == (2, static["tokens"] // 2, 6)


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 64, 97, 98, 99, 100, 500])
def test_blocks_change_nothing(window, monkeypatch):
    past = collect(make(), text(2, 100))
    whole = log_prob(past, window, 1.5)
    assert whole.shape == (2, max(0, 99 - window - 1))
    monkeypatch.setattr(cache, "SHORTEST", 3)
    monkeypatch.setattr(cache, "NUMBERS", 1)
    torch.testing.assert_close(log_prob(past, window, 1.5), whole, rtol=1e-12, atol=1e-12)
    assert evaluate(past, Cache(window, 1.5, 0.2))["tokens"] == 2 * 99


@pytest.mark.parametrize(("head", "core"), MODELS)
def test_a_text_that_repeats_itself_is_remembered(head, core):
    task = make(head, core, dtype=torch.float32)
    past = collect(task, text(1, 7).repeat(1, 40))
    assert evaluate(past, Cache(20, 1.0, 0.3))["loss"] < evaluate(past, Cache(20, 1.0, 0.0))["loss"] - 0.15


def test_a_word_outside_the_cache_keeps_its_share_of_the_model():
    task, rows = make(), torch.zeros(1, 40, dtype=torch.int64)
    rows[0, -1] = 5
    past = collect(task, rows)
    assert log_prob(past, 4, 1.0)[0, -1] == -math.inf
    with_it, without = (cache._mixed(past, log_prob(past, 4, 1.0), 4, weight) for weight in (0.5, 0.0))
    assert math.isfinite(with_it)
    assert with_it < without


def test_no_table_over_the_vocabulary_or_the_text_is_built(monkeypatch):
    model, largest = make(dtype=torch.float32).model, []
    past = collect(LanguageModeling(model, horizon=500, repackage=True), text(1, 6000))
    logsumexp = torch.Tensor.logsumexp

    def watched(tensor, *args, **kwargs):
        largest.append(tensor.numel())
        return logsumexp(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "logsumexp", watched)
    log_prob(past, 2000, 1.0)
    assert max(largest) <= cache.NUMBERS
    assert len(largest) < 20  # blocks of thousands of positions


def test_the_best_of_the_grid_is_chosen():
    past = collect(make(), text(1, 300))
    best, table = tune(past, Cache(20, 0.25, 0.01))
    assert {t["theta"] for t in table} == {*cache.THETAS, 0.25}
    assert {t["lambda"] for t in table} == {*cache.LAMBDAS, 0.01}
    assert len(table) == (1 + len(cache.THETAS)) * (1 + len(cache.LAMBDAS))
    for tried in table[::5]:
        assert evaluate(past, Cache(20, tried["theta"], tried["lambda"]))["loss"] == tried["loss"]
    assert evaluate(past, best)["loss"] == min(t["loss"] for t in table)
    assert best.window == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((0, 1.0, 0.1), "window: expected at least 1, got 0"),
        ((1, -1.0, 0.1), "theta: expected 0 or more, got -1.0"),
        ((1, math.nan, 0.1), "theta: expected 0 or more, got nan"),
        ((1, 1.0, 1.0), "lambda: expected a share in"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Cache(*settings)


def test_nothing_to_remember_is_an_error():
    with pytest.raises(ValueError, match="no window with anything to score"):
        collect(make(repackage=False), text(1, 2))
