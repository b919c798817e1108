"""Dynamic evaluation, against the definition written out segment by segment."""

import dataclasses
import json
import math
import os
import signal

import pytest
import torch

import char_ptb.train
import pmnist.train
import word_ptb.train
import wt103.train
from trellisnet.baselines import AWDLSTM, RHN, TCN, SparseEmbedding, SparseStack
from trellisnet.data.corpus import Corpus
from trellisnet.evaluation import adaptation, dynamic
from trellisnet.evaluation.dynamic import Update
from trellisnet.models import TrellisLanguageModel
from trellisnet.training import scoring
from trellisnet.training.config import parse
from trellisnet.training.distributed import Ranks
from trellisnet.training.interrupts import Interrupted, Interrupts
from trellisnet.training.tasks import LanguageModeling

V, E = 11, 6
HORIZON = 2  # of history, less than what the trellis can look back: it is read in windows, not as a stream
HEADS = {
    "softmax": {},
    "untied": {"tied": False},
    "mixture": {"n_experts": 3, "latent_dropout": 0.4, "log_epsilon": 1e-8},
    "split": {"cutoffs": [4, 8]},
}
CORES = {
    "trellis": {"weight_dropout": 0.3, "hidden_dropout": 0.3},
    "reference": {"backend": "reference", "activation": "gru"},
    "awd-lstm": {"core": AWDLSTM, "weight_dropout": 0.3},
    "tcn": {"core": TCN},
    "rhn": {"core": RHN, "hidden_dropout": 0.3},
    "sparse-lstm": {
        "core": SparseStack,
        "embedding": lambda *a, **k: SparseEmbedding(*a, blocks=2, density=0.6, **k),
    },
}

MODELS = [(head, "trellis") for head in HEADS] + [("softmax", core) for core in CORES if core != "trellis"]


def evaluate(task, rows, *args, segment=3, **options):
    return dynamic.evaluate(task, rows, *args, segments=task.segments(segment), **options)


def gradient_statistics(task, rows, **options):
    return dynamic.gradient_statistics(task, rows, segments=task.segments(3), **options)


def tune(task, rows, *args, **options):
    return dynamic.tune(task, rows, *args, segments=task.segments(3), **options)


def static_result(task, rows, segment=3, **options):
    return task.evaluate(rows, windows=task.segments(segment), **options)


def make(head="softmax", core="trellis", repackage=True, dtype=torch.float64):
    """A task with all dropouts set, which must not act."""
    torch.manual_seed(3)
    options = {"output_dropout": 0.4, "input_dropout": 0.3, "embedding_dropout": 0.2} | HEADS[head] | CORES[core]
    width = E if core == "rhn" else 8
    model = TrellisLanguageModel(V, E, width, 3, output_size=E, dtype=dtype, **options)
    for p in model.parameters():
        torch.nn.init.uniform_(p, -0.4, 0.4)
    carried = repackage and core != "tcn"
    return LanguageModeling(model, horizon=HORIZON, seq_len=0 if carried else 10, repackage=carried)


def text(rows=2, length=40, seed=5):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def mean_loss(model, inputs, targets, state, skip):
    out = model(inputs, state)
    log_p = model.log_prob(out.output[:, skip:])
    return -log_p.gather(2, targets[:, skip:, None]).mean(), out.state


def by_hand(task, rows, rule, lr, decay, epsilon, training, segment=3):
    """Krause et al., with nothing shared: losses of segments and gradients by torch alone.

    A carried state is computed again from where it was `HORIZON` positions, in whole segments, before the segment.
    """
    model = task.model.eval()
    names = [name for name, _ in model.named_parameters()]
    params = [p for _, p in model.named_parameters()]

    def segments(rows):
        skip = 0 if task.evaluation_windows.carried else HORIZON
        for start in range(0, rows.size(1) - 1 - skip, segment):
            end = min(start + skip + segment, rows.size(1) - 1)
            yield rows[:, start:end], rows[:, start + 1 : end + 1], skip

    squares, count, state = [torch.zeros_like(p) for p in params], 0, None
    for inputs, targets, skip in segments(training):
        loss, state = mean_loss(model, inputs, targets, state, skip)
        state = tuple(s.detach() for s in state) if task.evaluation_windows.carried else None
        for square, g in zip(squares, torch.autograd.grad(loss, params, allow_unused=True), strict=True):
            square += 0 if g is None else g**2
        count += 1
    rms = {name: (square / count).sqrt() for name, square in zip(names, squares, strict=True)}
    mean = sum(g.mean() for g in rms.values()) / len(rms)

    trained = weights_of(model)
    total, tokens, past, states = 0.0, 0, [], [None]  # states[i]: before segment i
    back = math.ceil(HORIZON / segment) if task.evaluation_windows.carried else 0
    for inputs, targets, skip in segments(rows):
        for i in range(max(0, len(past) - back), len(past)):
            states[i + 1] = tuple(s.detach() for s in model(past[i], states[i]).state)
        loss, state = mean_loss(model, inputs, targets, states[-1], skip)
        states.append(tuple(s.detach() for s in state) if task.evaluation_windows.carried else None)
        past.append(inputs)
        total += loss.item() * targets[:, skip:].numel()
        tokens += targets[:, skip:].numel()
        gradients = torch.autograd.grad(loss, params, allow_unused=True)
        with torch.no_grad():
            for name, p, g in zip(names, params, gradients, strict=True):
                g = torch.zeros_like(p) if g is None else g
                if rule == "rms":
                    d = (rms[name] / mean).clamp(max=1 / decay if decay else math.inf)
                    p += decay * d * (trained[name] - p) - lr * g / (rms[name] + epsilon)
                else:
                    p += decay * (trained[name] - p) - lr * g
    model.load_state_dict(trained)
    return rms, total / tokens, tokens


@pytest.mark.parametrize("repackage", [True, False], ids=["carried", "history"])
@pytest.mark.parametrize(("head", "core"), MODELS)
def test_the_definition(head, core, repackage):
    task, rows, training = make(head, core, repackage), text(), text(3, 31, 6)
    # A decay that reaches its limit of 1 for some weights.
    for rule, lr, decay in (("rms", 1e-3, 0.5), ("sgd", 0.05, 0.01), ("rms", 1e-3, 0.0)):
        rms, loss, tokens = by_hand(task, rows, rule, lr, decay, 1e-3, training)
        statistics = gradient_statistics(task, training)
        names = [name for name, _ in task.model.named_parameters()]
        for name, found in zip(names, statistics, strict=True):
            torch.testing.assert_close(found, rms[name], rtol=1e-7, atol=1e-12)
        result = evaluate(task, rows, Update(rule, lr, decay, 1e-3), statistics)
        assert result["tokens"] == tokens == 2 * (39 if task.evaluation_windows.carried else 39 - HORIZON)
        assert result["loss"] == pytest.approx(loss, rel=1e-8)


@pytest.mark.parametrize("repackage", [True, False], ids=["carried", "history"])
@pytest.mark.parametrize("core", ["trellis", "awd-lstm"])
def test_segments_shorter_than_the_horizon(core, repackage):
    task, rows, training = make(core=core, repackage=repackage), text(1, 20), text(3, 12, 6)
    _, loss, tokens = by_hand(task, rows, "sgd", 0.3, 0.01, 1e-3, training, segment=1)
    result = evaluate(task, rows, Update("sgd", 0.3, 0.01), segment=1)
    assert result == {"loss": pytest.approx(loss, rel=1e-9), "tokens": tokens}
    if repackage:
        task.horizon = 0  # keeps the states of the weights that computed them
        assert abs(evaluate(task, rows, Update("sgd", 0.3, 0.01), segment=1)["loss"] - loss) > 1e-6


def test_with_a_rate_of_zero_a_stream_is_bit_equal_to_static():
    task, rows = make(repackage=False, dtype=torch.float32), text(3, 60)
    long = LanguageModeling(task.model, horizon=3, seq_len=20)
    assert long.streams(long.segments(4))
    pieces = []
    unmoved, sizes = Update("sgd", 0.0, 0.0), lambda output, _: pieces.append(output.size(1))
    assert evaluate(long, rows, unmoved, segment=4, visit=sizes) == static_result(long, rows, 4)
    assert pieces == [56]  # as one
    part = evaluate(long, rows, unmoved, segment=4, max_tokens=30)
    assert part == static_result(long, rows, 4, max_tokens=30)


@pytest.mark.parametrize("repackage", [True, False], ids=["carried", "history"])
@pytest.mark.parametrize(("head", "core"), MODELS)
def test_with_a_rate_of_zero_the_score_is_bit_equal_to_static_and_leaves_nothing(head, core, repackage):
    # With gradients, torch's LSTMs in single precision have other last digits on a CPU.
    dtype = torch.float64 if "lstm" in core else torch.float32
    task, rows = make(head, core, repackage, dtype), text(3, 30)
    assert not task.streams(task.segments(3))
    task.model.train()
    before, static = weights_of(task.model), static_result(task, rows)
    statistics = gradient_statistics(task, text(4, 15))
    for rule in dynamic.RULES:
        assert evaluate(task, rows, Update(rule, 0.0, 0.0), statistics) == static
        unnoticed = 1e-42 if dtype == torch.float32 else 1e-300  # a step that changes no number, with gradients
        assert evaluate(task, rows, Update(rule, unnoticed, 0.0), statistics) == static
        moved = evaluate(task, rows, Update(rule, 1e-3, 1e-3), statistics)
        assert moved["loss"] != static["loss"]
        assert moved["tokens"] == static["tokens"]
        assert all(torch.equal(before[name], value) for name, value in task.model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in task.model.parameters())
        assert all(module.training for module in task.model.modules())


@pytest.mark.parametrize(("head", "core"), MODELS)
@pytest.mark.parametrize("rule", dynamic.RULES)
def test_a_text_that_repeats_itself_is_learned(head, core, rule):
    task = make(head, core, dtype=torch.float32)
    rows = text(1, 7).repeat(1, 25)
    statistics = gradient_statistics(task, text(8, 30))
    static = static_result(task, rows)["loss"]
    update = Update(rule, 5e-4 if rule == "rms" else 0.3, 1e-3)
    assert evaluate(task, rows, update, statistics)["loss"] < static - 0.02


def test_a_segment_is_scored_before_it_is_learned_from():
    task, rows = make(repackage=False), text(1, 50)
    update, statistics = Update("rms", 1e-2, 0.0), gradient_statistics(make(repackage=False), text(4, 40))
    alone = evaluate(task, rows, update, statistics, max_tokens=3)
    assert alone == static_result(task, rows, max_tokens=3)
    seen = []
    evaluate(task, rows, update, statistics, visit=lambda output, targets: seen.append((output, targets)))
    other = rows.clone()
    other[0, 30:] = (other[0, 30:] + 1) % V  # later tokens leave earlier losses alone
    changed = []
    evaluate(task, other, update, statistics, visit=lambda output, targets: changed.append((output, targets)))
    for i, (a, b) in enumerate(zip(seen, changed, strict=True)):
        assert torch.equal(a[0], b[0]) == (HORIZON + 3 * (i + 1) <= 30), i


def test_the_history_is_computed_with_the_current_weights():
    # A context of two positions, under weights that have taken steps: its features differ from what was scored before.
    task, rows = make(repackage=False), text(1, 20)
    model, update, trained = task.model.eval(), Update("sgd", 0.5, 0.0), weights_of(make(repackage=False).model)
    features = []
    evaluate(task, rows, update, visit=lambda output, targets: features.append((output, weights_of(model))))
    for i, (output, weights) in enumerate(features):
        model.load_state_dict(weights)
        start = 3 * i
        expected = model(rows[:, start : start + HORIZON + 3][:, : 19 - start]).output[:, HORIZON:]
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=0)
    model.load_state_dict(trained)
    assert not torch.equal(features[0][1]["core.bias"], features[2][1]["core.bias"])


@pytest.mark.parametrize("error", [RuntimeError("out"), KeyboardInterrupt(), Interrupted(15)])
def test_weights_are_restored_even_after_an_error(error):
    task = make()
    before, calls = weights_of(task.model), []

    def visit(output, targets):
        calls.append(not torch.equal(before["core.bias"], task.model.core.bias))
        if len(calls) == 4:
            raise error

    with pytest.raises(type(error)):
        evaluate(task, text(), Update("sgd", 0.5, 0.1), visit=visit)
    assert calls == [False, True, True, True]
    assert all(torch.equal(before[name], value) for name, value in task.model.state_dict().items())
    assert task.model.training


@pytest.mark.parametrize("core", ["awd-lstm", "sparse-lstm"])
def test_with_a_rate_of_zero_no_gradient_is_computed(core):
    task, rows = make(core=core, dtype=torch.float32), text(3, 30)
    kept = []
    found = evaluate(task, rows, Update("sgd", 0.0, 0.1), visit=lambda *_: kept.append(task.model.head.bias.clone()))
    assert found == static_result(task, rows)
    assert all(torch.equal(bias, kept[0]) for bias in kept)


def test_a_loss_that_is_not_finite_ends_the_evaluation_and_restores_the_weights():
    task = make(dtype=torch.float32)
    before = weights_of(task.model)
    result = evaluate(task, text(1, 200), Update("sgd", 1e38, 0.0))
    assert not math.isfinite(result["loss"])
    assert result["tokens"] < 199
    assert all(torch.equal(before[name], value) for name, value in task.model.state_dict().items())


def test_tied_weights_are_updated_once_and_frozen_ones_stay():
    task = make()
    assert len(gradient_statistics(task, text())) == len(list(task.model.parameters()))
    task.model.core.bias.requires_grad_(False)
    statistics = gradient_statistics(task, text())
    assert len(statistics) == len(list(task.model.parameters())) - 1
    biases = []
    evaluate(task, text(), Update(lr=0.1), statistics, visit=lambda *_: biases.append(task.model.core.bias.clone()))
    assert all(torch.equal(bias, biases[0]) for bias in biases)


def test_statistics_of_a_part_and_in_groups_of_rows():
    task, rows = make("mixture"), text(5, 40)
    whole = gradient_statistics(task, rows, limit=4)
    for options in ({"group": 2}, {"group": 9}):
        for a, b in zip(whole, gradient_statistics(task, rows, limit=4, **options), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    for a, b in zip(whole, gradient_statistics(task, rows[:, :13]), strict=True):  # four segments of 3
        assert torch.equal(a, b)
    assert not torch.equal(whole[0], gradient_statistics(task, rows)[0])


def test_in_bfloat16_every_segment_sees_the_current_weights():
    rows = text(1, 5).repeat(1, 30)
    for core in ("trellis", "reference", "awd-lstm"):
        task = make(core=core, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            static = static_result(task, rows)
            assert evaluate(task, rows, Update("sgd", 1e-42, 0.0)) == static or core == "awd-lstm"
            learned = evaluate(task, rows, Update("sgd", 0.3, 0.0))
        exact = evaluate(task, rows, Update("sgd", 0.3, 0.0))
        assert learned["loss"] == pytest.approx(exact["loss"], rel=0.02)
        assert learned["loss"] < static["loss"] - 0.2


def test_the_best_of_the_grid_is_chosen():
    task, rows, given = make(), text(1, 60), Update("rms", 1e-2, 1e-2)
    statistics = gradient_statistics(task, text(4, 40))
    best, table = tune(task, rows, given, statistics, max_tokens=30)
    assert {(t["lr"], t["decay"]) for t in table} == {(a * 1e-2, b * 1e-2) for a in (0.5, 1, 2) for b in (0.5, 1, 2)}
    for tried in table:
        update = dataclasses.replace(given, lr=tried["lr"], decay=tried["decay"])
        assert evaluate(task, rows, update, statistics, max_tokens=30)["loss"] == tried["loss"]
    chosen = min(table, key=lambda tried: tried["loss"])
    assert (best.lr, best.decay) == (chosen["lr"], chosen["decay"])
    assert len(tune(task, rows, Update("sgd", 1e-2, 0.0))[1]) == 3
    assert [t["loss"] < math.inf for t in tune(make(dtype=torch.float32), rows, Update("sgd", 1e38, 0.0))[1]] == [
        False
    ] * 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Update("adam"), "rule: expected one of rms, sgd, got 'adam'"),
        (lambda: Update(lr=-1.0), "lr: expected 0 or more, got -1.0"),
        (lambda: Update(decay=math.nan), "decay: expected 0 or more, got nan"),
        (lambda: Update(epsilon=0.0), "epsilon: expected more than 0"),
        (lambda: evaluate(make(), text(), Update()), "statistics: the rule rms expects .* tensors, got"),
        (lambda: evaluate(make(), text(), Update(), [torch.ones(1)]), "expects .* tensors, got 1"),
        (lambda: evaluate(make(repackage=False), text(1, 2), Update("sgd")), "rows of 2 tokens hold no window"),
        (lambda: gradient_statistics(make(repackage=False), text(1, 2)), "rows of 2 tokens hold no window"),
        (lambda: make().segments(0), "length: expected at least 1, got 0"),
    ],
)
def test_impossible_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- from the command line ---------------------------------------------------------------------------------------------

SMALL = """--data synthetic --emsize 8 --nhid 8 --nout 8 --nlevels 2 --horizon 5 --dropout 0.1 --aux 0 --threads 1
--batch_size 40 --eval_batch_size 4 --max_eval_tokens 100""".split()
COMMANDS = {
    "words": (word_ptb.train.main, "--seq_len 15 --optim Adam --lr 0.01 --alpha 0 --beta 0"),
    "mixture": (word_ptb.train.main, "--repack --seq_len 0 --n_experts 2 --optim Adam --lr 0.01"),
    "awd-lstm": (word_ptb.train.main, "--model awd-lstm --lr 5"),
    "characters": (char_ptb.train.main, ""),
    "bands": (wt103.train.main, "--cutoffs 20 60"),
}


@pytest.fixture
def run(tmp_path, capsys):
    """Run a main: exit code, standard output, standard error and the metrics (or None)."""
    threads = torch.get_num_threads()

    def call(main, *argv, base=SMALL):
        metrics = tmp_path / "metrics.json"
        metrics.unlink(missing_ok=True)
        code = main([str(a) for a in (*base, "--metrics", metrics, *argv)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err, json.loads(metrics.read_text()) if metrics.exists() else None

    yield call
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "mode", [mode if mode in ("words", "bands") else pytest.param(mode, marks=pytest.mark.slow) for mode in COMMANDS]
)
def test_one_run_scores_static_cached_and_dynamic(run, tmp_path, mode):
    main, flags = COMMANDS[mode]
    flags = flags.split()
    assert run(main, *flags, "--max_steps", 10, "--out", tmp_path / "run")[0] == 0
    there = [*flags, "--eval", "--load_weight", tmp_path / "run" / "weights.pkl"]
    ways = "--cache 30 1 0.1 --cache_tune --dynamic_eval --dynamic_eval_tune --dynamic_eval_stats 9".split()
    code, out, err, metrics = run(main, *there, *ways)
    assert (code, err) == (0, "")
    score = "bpc" if mode == "characters" else "ppl"
    rows = run(main, *there, "--eval_batch_size", 1)[3]
    for split in ("valid", "test"):
        static, plain = metrics[f"{split}_static"], metrics[split]
        assert (static["loss"], static["tokens"]) == (rows[split]["loss"], rows[split]["tokens"])
        assert plain["partial"]
        segments = {"static_segments"} & {key.partition("_")[2] for key in metrics}
        assert segments == (set() if mode in ("mixture", "awd-lstm", "characters", "bands") else {"static_segments"})
        for way in ("static", *segments, "cache", "dynamic", "dynamic_cache"):
            result = metrics[f"{split}_{way}"]
            assert result.keys() >= {"loss", score, "tokens", "seconds", "peak_memory"}
            assert result["tokens"] >= 100
            assert f"{split}_{way} {score} {result[score]:.{4 if score == 'bpc' else 2}f}  loss" in out
        for way in ("cache", "dynamic", "dynamic_cache"):  # chosen on validation, then applied to test
            assert metrics[f"{split}_{way}"]["settings"] == metrics[f"valid_{way}"]["settings"]
    valid = metrics["valid_dynamic"]
    best = min(valid["grid"], key=lambda tried: tried["loss"])
    assert {key: best[key] for key in ("lr", "decay")}.items() <= valid["settings"].items()
    assert valid["loss"] == best["loss"]  # 100 tokens are all that either sees
    assert valid["settings"] | {"rule": "rms", "segment": 5, "epsilon": 2e-5} == valid["settings"]
    assert valid["statistics_seconds"] < valid["preparation_seconds"]
    for way in ("cache", "dynamic_cache"):
        cached = metrics[f"valid_{way}"]
        best = min(cached["grid"], key=lambda tried: tried["loss"])
        assert cached["settings"] == {"window": 30, "theta": best["theta"], "lambda": best["lambda"]}
        assert cached["loss"] == best["loss"]
    assert "grid" not in metrics["test_dynamic"]
    for split in ("valid", "test"):  # what dynamic evaluation takes is counted in
        both, alone = metrics[f"{split}_dynamic_cache"], metrics[f"{split}_dynamic"]
        assert both["seconds"] > alone["seconds"]
        assert (both["peak_memory"] or 0) >= (alone["peak_memory"] or 0)
    peaks = [
        metrics[f"{split}_{way}"]["peak_memory"] or 0 for split in ("valid", "test") for way in ("static", "dynamic")
    ]
    assert metrics["peak_memory"] >= max(peaks)


def test_without_steps_the_program_reports_the_static_score(run, tmp_path):
    main, flags = word_ptb.train.main, "--repack --seq_len 0 --optim Adam --lr 0.01".split()
    assert run(main, *flags, "--max_steps", 5, "--out", tmp_path / "run")[0] == 0
    there = [*flags, "--eval", "--load_weight", tmp_path / "run" / "weights.pkl"]
    still = "--dynamic_eval --dynamic_eval_rule sgd --dynamic_eval_lr 0 --dynamic_eval_decay 0".split()
    code, _, err, metrics = run(main, *there, *still, "--cache", 5, 1, 0, "--adapt_rows", 4)
    assert (code, err) == (0, "")
    for split in ("valid", "test"):
        losses = {metrics[f"{split}{way}"]["loss"] for way in ("", "_static", "_cache", "_dynamic", "_dynamic_cache")}
        assert len(losses) == 1
        assert f"{split}_static_segments" not in metrics
    # In other segments than those of training.
    metrics = run(main, *there, *still, "--dynamic_eval_segment", 2)[3]
    assert metrics["valid_dynamic"]["loss"] == metrics["valid_static_segments"]["loss"]
    assert metrics["valid_dynamic"]["loss"] != metrics["valid_static"]["loss"]
    code, _, err, _ = run(main, *there, "--cache", 500, "1e300", 0.1, "--max_eval_tokens", 1000)
    reason, where = "the loss with --cache is not a number; lower THETA from 1e+300", tmp_path / "metrics.json"
    assert code == 1
    assert err == f"failed: {reason}; valid_cache was not finished; the scores before it are in {where}\n"
    code, _, err, _ = run(main, *there, *still[:3], "--dynamic_eval_lr", "1e308", "--dynamic_eval_tune")
    assert code == 1
    assert err.startswith("failed: dynamic evaluation of valid diverged after ")
    code, _, err, _ = run(main, *there, *still[:3], "--dynamic_eval_lr", "1e38")
    assert code == 1
    assert err.startswith("failed: dynamic evaluation of valid diverged after ")
    assert "lower --dynamic_eval_lr from 1e+38" in err


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_finished_scores_survive_a_later_one_that_is_ended(run, tmp_path, monkeypatch, capsys, signum, code):
    main, flags = word_ptb.train.main, "--repack --seq_len 0 --optim Adam --lr 0.01".split()
    assert run(main, *flags, "--max_steps", 5, "--out", tmp_path / "run")[0] == 0
    there = [*flags, "--eval", "--load_weight", tmp_path / "run" / "weights.pkl", "--cache", 30, 1, 0.1]
    whole = run(main, *there)[3]
    monkeypatch.setattr(adaptation.dynamic, "evaluate", lambda *_, **__: os.kill(os.getpid(), signum))
    ended = run(main, *there, "--dynamic_eval", "--dynamic_eval_stats", 2)
    path = tmp_path / "metrics.json"
    line = "interrupted; valid_dynamic was not finished; the scores before it are"
    assert (ended[0], ended[2]) == (code, f"{line} in {path}\n")
    for name in ("valid", "test", "valid_static", "test_static", "valid_cache", "test_cache"):
        assert ended[3][name]["loss"] == whole[name]["loss"]
    assert not {"valid_dynamic", "test_dynamic"} & ended[3].keys()
    assert ended[3]["complete"] is False
    assert main([str(a) for a in (*SMALL, *there, "--dynamic_eval", "--dynamic_eval_stats", 2)]) == code
    assert capsys.readouterr().err == f"{line} printed above\n"


@pytest.mark.parametrize("way", ["--cache 5 1 0.1", "--dynamic_eval", "--dynamic_eval --dynamic_eval_tune"])
def test_a_rank_that_receives_a_signal_ends_the_others(way, monkeypatch):
    config, _ = parse(
        word_ptb.train.Config, [*SMALL, *"--repack --seq_len 0 --eval --load_weight x".split(), *way.split()]
    )
    task, interrupts = make(dtype=torch.float32), Interrupts()
    splits = [torch.arange(V).repeat(n) for n in (90, 30, 30)]
    corpus = Corpus(list(map(str, range(V))), *splits, sha256="", label="")
    evaluations, ranks = adaptation.scores(config, task, corpus), Ranks(rank=0, size=2)
    monkeypatch.setattr(interrupts, "_pending", 15)
    monkeypatch.setattr(Ranks, "gather", lambda _, signum: [signum, 0])
    for name, (method, rows) in evaluations.items():
        if not name.endswith(("static", "static_segments")):  # these are divided among the ranks
            with pytest.raises(Interrupted):
                scoring.evaluate(task, rows, name, config, method, ranks, interrupts)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--dynamic_eval", "--dynamic_eval: scores trained weights; pass --eval and --load_weight FILE"),
        ("--cache 9 1 .1", "--cache: scores trained weights; pass --eval and --load_weight FILE"),
        ("--eval --dynamic_eval_tune", "--dynamic_eval_tune: has no effect without --dynamic_eval"),
        ("--eval --dynamic_eval_lr 1", "--dynamic_eval_lr: has no effect without --dynamic_eval"),
        ("--eval --cache_tune", "--cache_tune: has no effect without --cache"),
        ("--eval --adapt_rows 2", "--adapt_rows: has no effect without --cache or --dynamic_eval"),
        ("--eval --dynamic_eval --dynamic_eval_lr -2", "--dynamic_eval_lr: expected at least 0, or -1 for the default"),
        ("--eval --dynamic_eval --dynamic_eval_segment 0", "--dynamic_eval_segment: expected at least 1, got 0"),
        ("--eval --dynamic_eval --dynamic_eval_stats -1", "--dynamic_eval_stats: expected at least 0, got -1"),
        ("--eval --dynamic_eval --dynamic_eval_epsilon 0", "--dynamic_eval_epsilon: expected more than 0, got 0.0"),
        ("--eval --dynamic_eval --dynamic_eval_rule adam", "argument --dynamic_eval_rule: invalid choice: 'adam'"),
        ("--eval --dynamic_eval --adapt_rows 9999999", "--adapt_rows 9999999: the text is too short for so many"),
        ("--eval --dynamic_eval --adapt_rows 4000", "--adapt_rows 4000: rows of 1 token of valid are too short"),
        ("--eval --cache 9 1", "--cache 9 1: expected three numbers, WINDOW THETA LAMBDA"),
        ("--eval --cache 9.5 1 .1", "--cache 9.5 1 0.1: WINDOW: expected a whole number of positions ≥ 1, got 9.5"),
        ("--eval --cache 0 1 .1", "--cache 0 1 0.1: WINDOW: expected a whole number of positions ≥ 1, got 0"),
        ("--eval --cache 9 -1 .1", "--cache 9 -1 0.1: THETA: expected 0 or more, got -1"),
        ("--eval --cache 9 1 1", "--cache 9 1 1: LAMBDA: expected a share in [0, 1), got 1"),
        ("--eval --cache 9 1 nan", "--cache: expected a finite number, got nan"),
        ("--eval --cache 1234567 1 .1", "--cache 1234567 1 0.1: WINDOW: expected at most 103, as 105 positions of a"),
        ("--eval --cache 104 1 .1", "WINDOW: expected at most 103, as 105 positions of a row of valid are scored"),
        ("--eval --cache 5923 1 .1 --max_eval_tokens 0", "WINDOW: expected at most 5922, as 5,924 positions of a row"),
        ("--eval --cache 9 one .1", "argument --cache: invalid float value: 'one'"),
        ("--eval --recite --cache 9 1 .1", "--recite: is scored window by window; leave out "),
    ],
)
def test_settings_that_make_no_sense_are_one_line(run, argv, message):
    code, _, err, _ = run(word_ptb.train.main, *argv.split(), "--seq_len", 12)
    assert code == 2
    assert message in err
    assert (err.startswith("error: "), err.count("\n")) == (True, 1)


def test_images_have_no_adaptive_scores(run):
    for flag in ("--cache", "--dynamic_eval"):
        code, _, err, _ = run(pmnist.train.main, flag, base=["--data", "synthetic"])
        assert (code, err) == (2, f"error: unknown argument {flag}; --help lists the flags\n")


def test_a_settings_file_leaves_them_out(run, tmp_path):
    (tmp_path / "c.json").write_text('{"dynamic_eval": true}')
    code, _, err, _ = run(word_ptb.train.main, "--config", tmp_path / "c.json", "--eval")
    assert code == 2
    assert err.endswith("dynamic_eval is not stored in files; pass it on the command line\n")
