"""Windows, losses and evaluation of language modelling."""

import math
import warnings

import pytest
import torch
from torch.testing import assert_close

from trellisnet.models import TrellisLanguageModel
from trellisnet.regularization import Masks
from trellisnet.training.tasks import LanguageModeling, Reciting, Windows


def task(num_layers=3, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = TrellisLanguageModel(
        20, 4, 7, num_layers, output_size=4, weight_norm=False, dtype=dtype, output_dropout=options.pop("dropout", 0.0)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4)
    return LanguageModeling(model, **{"horizon": 5, "seq_len": 12} | options)


def rows(n=2, length=40):
    return torch.randint(20, (n, length), generator=torch.Generator().manual_seed(4))


def starts(windows):
    return [(start, inputs.size(1)) for start, inputs, _ in windows]


def quiet(**options):
    with warnings.catch_warnings(action="ignore"):
        return task(**options)


@pytest.mark.parametrize(
    ("options", "training", "expected"),
    [
        ({}, True, [(0, 12), (7, 12), (14, 12), (21, 12), (28, 11)]),
        ({}, False, [(0, 12), (7, 12), (14, 12), (21, 12), (28, 11)]),
        ({"seq_len": 4}, False, [(0, 5), (5, 5), (10, 5), (15, 5), (20, 5), (25, 5), (30, 5), (35, 4)]),
        ({"seq_len": 0, "repackage": True, "horizon": 16}, True, [(0, 16), (16, 16), (32, 7)]),
        ({"seq_len": 0, "repackage": True, "horizon": 16}, False, [(0, 16), (16, 16), (32, 7)]),
        ({"repackage": True}, True, [(0, 12), (7, 12), (14, 12), (21, 12), (28, 11)]),
        ({"repackage": True}, False, [(0, 5), (5, 5), (10, 5), (15, 5), (20, 5), (25, 5), (30, 5), (35, 4)]),
    ],
)
def test_windows(options, training, expected):
    data = rows()
    windows = list(quiet(**options).windows(data, training))
    assert starts(windows) == expected
    for start, inputs, targets in windows:
        assert torch.equal(inputs, data[:, start : start + inputs.size(1)])
        assert torch.equal(targets, data[:, start + 1 : start + 1 + inputs.size(1)])


def test_real_numbers_are_no_ids():
    t, rows = task(), torch.rand(3, 30)
    for call in (lambda: t.evaluate(rows), lambda: t.evaluate_all(rows[0]), lambda: next(t.windows(rows))):
        with pytest.raises(TypeError, match="^rows: expected ids in int64, got float32$"):
            call()


def test_windows_with_nothing_to_score_are_skipped():
    assert starts(task().windows(rows(length=20))) == [(0, 12), (7, 12)]
    assert starts(task().windows(rows(length=7))) == [(0, 6)]
    assert starts(task().windows(rows(length=6))) == []
    with pytest.raises(ValueError, match="rows of 6 tokens hold no window"):
        task().evaluate(rows(length=6))
    with pytest.raises(ValueError, match="rows of 6 tokens hold no window"):
        task().batches(rows(length=6))


@pytest.mark.parametrize(
    ("options", "training", "evaluation"),
    [
        ((5, 12, False), Windows(5, 7), Windows(5, 7)),  # history
        ((5, 12, True), Windows(5, 7, carried=True), Windows(0, 5, carried=True)),  # the word-level script
        ((5, 0, True), Windows(0, 5, carried=True), Windows(0, 5, carried=True)),  # the character-level script
        ((5, 6, False), Windows(5, 1), Windows(5, 1)),
        ((5, 5, False), Windows(5, 0), Windows(0, 5)),
        ((5, 0, False), Windows(5, -5), Windows(0, 5)),
    ],
)
def test_the_authors_rules_for_windows(options, training, evaluation):
    assert Windows.for_training(*options) == training
    assert Windows.for_evaluation(*options) == evaluation


@pytest.mark.parametrize(
    ("windows", "stride", "length", "starts"),
    [
        # From the first length of a row at which a window begins, the starts of its windows.
        (Windows(5, 7), 7, 12, {6: [], 7: [0], 13: [0], 14: [0, 7], 20: [0, 7], 21: [0, 7, 14]}),
        (Windows(0, 5), 5, 5, {0: [], 1: [], 2: [0], 6: [0], 7: [0, 5], 11: [0, 5], 12: [0, 5, 10]}),
        (Windows(3, 1), 1, 4, {4: [], 5: [0], 6: [0, 1]}),
    ],
)
def test_windows_begin_where_something_is_left_to_score(windows, stride, length, starts):
    assert (windows.stride, windows.length) == (stride, length)
    for tokens, expected in starts.items():
        assert list(windows.starts(tokens)) == expected
        data, scored = rows(2, tokens), []
        for start in windows.starts(tokens):
            inputs, targets = windows.cut(data, start)
            assert torch.equal(inputs[:, 1:], targets[:, :-1])
            assert windows.context < inputs.size(1) <= length
            scored.append(targets[:, windows.context :])
        assert torch.equal(torch.cat([data[:, :0], *scored], 1), data[:, windows.context + 1 :])


@pytest.mark.parametrize(("max_tokens", "count"), [(None, 3), (1, 1), (14, 1), (15, 2), (28, 2), (29, 3), (999, 3)])
def test_windows_to_score_end_with_the_one_that_reaches_max_tokens(max_tokens, count):
    assert len(Windows(5, 7).starts_to_score(rows(2, 21), max_tokens)) == count
    with pytest.raises(ValueError, match="rows of 6 tokens hold no window"):
        Windows(5, 7).starts_to_score(rows(2, 6), max_tokens)


@pytest.mark.parametrize("scored", [0, -5])
def test_windows_that_score_nothing_are_refused(scored):
    with pytest.raises(ValueError, match=f"history mode needs seq_len > horizon = 5, got {5 + scored}; make it longer"):
        Windows(5, scored).starts(20)


def test_windows_of_equal_length_are_grouped():
    windows = Windows(5, 7)
    assert windows.groups(41, 2) == [(0, [0]), (5, [7, 14]), (5, [21, 28])]
    assert windows.groups(40, 2) == [(0, [0]), (5, [7, 14]), (5, [21]), (5, [28])]  # the last is shorter
    assert windows.groups(40, 9) == [(0, [0]), (5, [7, 14, 21]), (5, [28])]
    assert windows.groups(40, 2, max_tokens=12) == [(0, [0])]
    assert windows.groups(40, 2, max_tokens=13) == [(0, [0]), (5, [7, 14])]
    assert windows.groups(40, 2, max_tokens=27) == [(0, [0]), (5, [7, 14]), (5, [21])]
    assert windows.groups(40, 2, max_tokens=34) == windows.groups(40, 2)
    for length in (8, 6, 2):  # down to a single target
        assert windows.groups(length, 2) == [(0, [0])]
    with pytest.raises(ValueError, match="rows of 1 token hold no window"):
        windows.groups(1, 2)


def test_a_carried_state_is_a_detached_copy():
    whole = torch.ones(2, 9, 3, requires_grad=True)
    state = Windows(0, 5, carried=True).carry((whole[:, -1], whole[:, 0]))
    assert [(part.requires_grad, part.untyped_storage().nbytes()) for part in state] == [(False, 24), (False, 24)]
    assert Windows(0, 5).carry((whole[:, -1], whole[:, 0])) is None


def test_segments_have_the_history_of_evaluation():
    assert task().segments(3) == Windows(5, 3)
    assert quiet(repackage=True).segments(3) == task(seq_len=0, repackage=True).segments(3) == Windows(0, 3, True)
    with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
        task().segments(0)


def test_the_authors_counts_on_penn_treebank():
    """Scored tokens and windows of their loops, from the stream lengths alone (semantics of the released scripts)."""
    word = task(horizon=58, seq_len=110)
    splits = ((929_589, 16, 1117, 928_640), (73_760, 12, None, 73_044), (82_430, 12, None, 81_720))
    for tokens, n, windows, scored in splits:
        lengths = [i.size(1) for _, i, _ in word.windows(torch.zeros(n, tokens // n, dtype=torch.int64))]
        assert sum(length - 58 for length in lengths) * n == scored
        assert windows is None or (len(lengths), lengths[-1]) == (windows, 66)
    tcn = task(horizon=40, seq_len=80)
    lengths = [i.size(1) for _, i, _ in tcn.windows(torch.zeros(10, 82_430 // 10, dtype=torch.int64))]
    assert sum(length - 40 for length in lengths) * 10 == 82_020
    char = task(horizon=140, seq_len=0, repackage=True)
    for tokens, windows, scored in ((399_782, 286, 399_770), (449_945, 322, 449_930)):
        lengths = [i.size(1) for _, i, _ in char.windows(torch.zeros(10, tokens // 10, dtype=torch.int64), False)]
        assert (len(lengths), sum(lengths) * 10) == (windows, scored)


def test_a_scored_token_sees_its_whole_receptive_field():
    """With horizon ≥ num_layers its log-probability does not depend on how the windows lie."""
    data = rows(length=60)
    short, long = task(horizon=3, seq_len=12), task(horizon=3, seq_len=60)
    assert short.evaluate(data)["loss"] == pytest.approx(long.evaluate(data)["loss"], abs=1e-12)


def test_loss_terms():
    t = task(aux_weight=0.5, aux_every=2, alpha=2.0, beta=3.0)
    data = rows(length=13)
    losses, state = t.loss(data[:, :-1], data[:, 1:])
    out = t.model(data[:, :-1], aux_every=2)
    scored, targets = slice(5, None), data[:, 6:]
    assert state is None
    assert_close(losses["raw"], t.model.loss(out.output[:, scored], targets))
    assert_close(losses["aux"], 0.5 * t.model.loss(out.aux[0][:, scored], targets))
    assert_close(losses["alpha"], 2 * out.output[:, scored].pow(2).mean())
    assert_close(losses["beta"], 3 * (out.raw_output[:, 6:] - out.raw_output[:, 5:-1]).pow(2).mean())
    assert_close(losses["loss"], losses["raw"] + losses["aux"] + losses["alpha"] + losses["beta"])
    assert all(value.dim() == 0 for value in losses.values())


@pytest.mark.parametrize("aux_weight", [0.0, -1.0])
def test_terms_that_are_off_are_zero(aux_weight):
    data = rows(length=13)
    losses, _ = task(aux_weight=aux_weight, aux_every=2).loss(data[:, :-1], data[:, 1:])
    assert [losses[k].item() for k in ("aux", "alpha", "beta")] == [0, 0, 0]
    assert torch.equal(losses["loss"], losses["raw"])


def test_a_last_window_with_one_scored_position_has_a_finite_loss():
    data = rows(length=7)
    losses, _ = task(beta=1.0, alpha=1.0).loss(data[:, :-1], data[:, 1:])
    assert math.isfinite(losses["loss"].item())
    with pytest.raises(ValueError, match="a window of 5 tokens holds nothing to score"):
        task().loss(data[:, :5], data[:, 1:6])


def test_loss_takes_the_rule_of_the_models_mode():
    t = quiet(repackage=True)  # history windows in training, plain ones in evaluation
    data = rows(length=6)
    t.model.train()
    with pytest.raises(ValueError, match="nothing to score"):
        t.loss(data[:, :-1], data[:, 1:])
    t.model.eval()
    losses, _ = t.loss(data[:, :-1], data[:, 1:])
    assert_close(losses["raw"], t.model.loss(t.model(data[:, :-1]).output, data[:, 1:]))


def test_repackaging_carries_a_detached_state():
    t, data = task(seq_len=0, repackage=True), rows(length=11)
    _, state = t.loss(data[:, :5], data[:, 1:6])
    assert [part.requires_grad for part in state] == [False, False]
    losses, _ = t.loss(data[:, 5:10], data[:, 6:11], state)
    fresh, _ = t.loss(data[:, 5:10], data[:, 6:11])
    assert losses["loss"] != fresh["loss"]


def test_evaluate_is_the_token_weighted_mean_and_restores_the_mode():
    t, data = task(seq_len=0, repackage=True, horizon=16, dropout=0.5), rows()
    t.model.train()
    result = t.evaluate(data)
    assert t.model.training
    t.model.eval()
    state, parts = None, []
    for _, inputs, targets in t.windows(data, training=False):
        out = t.model(inputs, state)
        state = out.state
        parts.append(t.model.loss(out.output, targets, reduction="none").flatten())
    assert result["tokens"] == 78
    assert result["loss"] == pytest.approx(torch.cat(parts).mean().item(), abs=1e-12)
    t.evaluate(data)
    assert not t.model.training


def test_evaluate_can_stop_early_and_report_progress():
    seen = []

    def progress(windows, total):
        seen.append(total)
        return windows

    few = {"max_tokens": 20, "progress": progress}
    assert task(num_layers=6).evaluate(rows(), **few)["tokens"] == 28  # two windows of 2 × 7
    assert task().evaluate(rows(), **few)["tokens"] == 28  # streamed, in one piece
    assert seen == [2, 1]  # windows that will be scored; pieces of a stream


def test_the_overlap_of_repackaged_history_windows_is_warned_of():
    with pytest.warns(UserWarning, match="training windows overlap by 5 positions"):
        task(repackage=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "horizon: expected at least 1, got 0"),
        ({"seq_len": -1}, "seq_len: expected 0 or more, got -1"),
        ({"aux_weight": 0.1}, "aux_every: expected a number of layers"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        task(**options)


@pytest.mark.parametrize("seq_len", [0, 5])
def test_history_mode_needs_windows_longer_than_the_horizon(seq_len):
    with pytest.raises(ValueError, match=f"seq_len: history mode needs seq_len > horizon = 5, got {seq_len}"):
        list(task(seq_len=seq_len).windows(rows()))


def test_perplexity():
    assert task().score(math.log(50)) == pytest.approx(50)
    assert task().score(1e6) == math.inf


@pytest.mark.parametrize(
    "options", [{}, {"seq_len": 4}, {"seq_len": 0, "repackage": True}, {"seq_len": 50, "horizon": 45}]
)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_token_is_scored_once_under_its_windows_history(options, batch_size):
    t, stream = task(**options), rows(1, 61)[0]
    result = t.evaluate_all(stream, batch_size=batch_size)
    assert result["tokens"] == 60
    t.model.eval()
    parts, state, skip = [], None, 0
    for start, inputs, targets in t.windows(stream[None], training=False):
        out = t.model(inputs, state)
        state = out.state if t.evaluation_windows.carried else None
        skip = t.evaluation_windows.context if start else 0
        parts.append(t.model.loss(out.output[:, skip:], targets[:, skip:], reduction="none").flatten())
    assert torch.cat(parts).numel() == 60
    assert result["loss"] == pytest.approx(torch.cat(parts).mean().item(), abs=1e-12)


@pytest.mark.parametrize("max_tokens", [None, 20])
def test_reciting_every_token_counts_the_most_probable_ones(max_tokens):
    t, stream = task(), rows(1, 61)[0]
    t = Reciting(t.model, horizon=5, seq_len=12)
    result = t.evaluate_all(stream, batch_size=2, max_tokens=max_tokens)
    assert result["tokens"] == (60 if max_tokens is None else 26)  # a window of 12 and a group of two with 7 more each
    t.model.eval()
    output = t.model(stream[None]).output  # within reach of the context, so that windows change nothing
    right = (t.model.log_prob(output)[0, :-1].argmax(-1) == stream[1:])[: result["tokens"]]
    assert result["accuracy"] == pytest.approx(right.double().mean().item())
    assert 0 < result["accuracy"] < 1


@pytest.mark.parametrize(("kernel_size", "dilation", "reach"), [(2, (1,), 3), (3, (1, 2), 8), (2, (1, 1, 4), 6)])
@pytest.mark.parametrize("seq_len", [9, 12, 50])
@pytest.mark.parametrize("length", [10, 41])
@pytest.mark.parametrize("max_tokens", [None, 1, 17])
def test_streamed_evaluation_scores_what_windows_score(
    monkeypatch, kernel_size, dilation, reach, seq_len, length, max_tokens
):
    torch.manual_seed(0)
    model = TrellisLanguageModel(
        20, 5, 7, 3, output_size=5, kernel_size=kernel_size, dilation=dilation, weight_norm=False, dtype=torch.float64
    )
    torch.nn.init.normal_(model.core.weight_h)
    monkeypatch.setattr("trellisnet.training.tasks.windows.STREAM_POSITIONS", 14)  # pieces of 7 steps
    assert model.core.reach == reach
    t = LanguageModeling(model, horizon=8, seq_len=seq_len)
    assert t.streams(t.evaluation_windows)
    for data, evaluate in ((rows(2, length), t.evaluate), (rows(1, length)[0], t.evaluate_all)):
        streamed = evaluate(data, max_tokens=max_tokens)
        with monkeypatch.context() as m:
            m.setattr(t, "streams", lambda _: False)
            windowed = evaluate(data, max_tokens=max_tokens)
        assert streamed["tokens"] == windowed["tokens"]
        assert streamed["loss"] == pytest.approx(windowed["loss"], abs=1e-12)


def test_evaluation_is_streamed_only_where_that_is_exact():
    assert task(horizon=5).model.core.reach <= 5
    streams = [
        t.streams(t.evaluation_windows)
        for t in (task(horizon=5), task(horizon=task().model.core.reach - 1), task(seq_len=0, repackage=True))
    ]
    assert streams == [True, False, False]
    grouped = TrellisLanguageModel(20, 5, 10, 6, output_size=5, kernel_groups=2)
    assert grouped.core.receptive_field <= 6 < grouped.core.reach + 1  # hidden states reach further back than x


def test_masks_without_a_latent_one_drop_no_latent():
    torch.manual_seed(0)
    model = TrellisLanguageModel(20, 4, 7, 3, output_size=5, n_experts=2, latent_dropout=0.5, dtype=torch.float64)
    t, data = LanguageModeling(model, horizon=5, seq_len=12, aux_weight=0.5, aux_every=2), rows(length=13)
    model.train()
    losses = [t.loss(data[:, :-1], data[:, 1:], masks=Masks())[0]["loss"] for _ in range(2)]
    drawn = [t.loss(data[:, :-1], data[:, 1:])[0]["loss"] for _ in range(2)]
    assert losses[0] == losses[1]
    assert drawn[0] != drawn[1]
    mask = torch.zeros(2, 1, 8)
    dropped = t.loss(data[:, :-1], data[:, 1:], masks=Masks(latent=mask, latent_aux=mask[:, None]))[0]["loss"]
    assert dropped != losses[0]


def test_every_loss_is_smoothed_as_by_cross_entropy():
    """In training, auxiliary losses included; reported and evaluated losses stay as they are."""
    options = {"aux_weight": 0.3, "aux_every": 1}
    plain, smooth = task(**options), task(**options, label_smoothing=0.2)
    _, inputs, targets = next(plain.windows(rows()))
    out = smooth.model(inputs, start=5, aux_every=1)
    parts = [(1.0, out.output), *((0.3, aux) for aux in out.aux)]
    assert len(parts) == 4
    logits = [(weight, smooth.model.head.logits(x).flatten(0, 1)) for weight, x in parts]
    expected = sum(
        weight * torch.nn.functional.cross_entropy(each, targets[:, 5:].flatten(), label_smoothing=0.2)
        for weight, each in logits
    )
    (theirs, _), (ours, _) = (t.loss(inputs, targets) for t in (plain, smooth))
    assert_close(ours["loss"], expected)
    wanted = list(smooth.model.parameters())
    exact = torch.autograd.grad(expected, wanted)
    for a, b in zip(torch.autograd.grad(ours["loss"], wanted), exact, strict=True):
        assert_close(a, b)
    assert_close(ours["loss"], ours["raw"] + ours["aux"] + ours["smoothing"])
    assert all(torch.equal(ours[name], theirs[name]) for name in ("raw", "aux"))
    assert ours["smoothing"].abs() > 1e-3
    assert smooth.evaluate(rows()) == plain.evaluate(rows())


@pytest.mark.parametrize("kind", [{"n_experts": 2}, {"cutoffs": [5, 10]}])
def test_label_smoothing_needs_a_plain_softmax(kind):
    model = TrellisLanguageModel(20, 4, 7, 3, output_size=4, **kind)
    with pytest.raises(ValueError, match="label_smoothing: needs a plain softmax"):
        LanguageModeling(model, horizon=5, seq_len=12, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing: expected a share in \[0, 1\), got 1"):
        LanguageModeling(model, horizon=5, seq_len=12, label_smoothing=1)
