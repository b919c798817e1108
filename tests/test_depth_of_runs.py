"""Runs of changing depth: stages, a depth drawn for every update, and scores at every depth."""

import json
import math
import shutil
import warnings

import pytest
import torch
from torch.testing import assert_close

from pmnist.train import main as pmnist_main
from trellisnet import load_pretrained
from trellisnet.baselines import AWDLSTM
from trellisnet.equilibrium import EquilibriumTrellisNet
from trellisnet.errors import UserError
from trellisnet.models import TrellisLanguageModel
from trellisnet.training import checkpoint, depth
from trellisnet.training.config import check_settings, parse
from trellisnet.training.scoring import depth_scores, set_depth
from trellisnet.training.tasks import LanguageModeling, Windows
from trellisnet.training.tasks.base import at_depth
from word_ptb.model import Config
from word_ptb.train import main

EXACT = {"atol": 1e-12, "rtol": 1e-12}
MODEL = """--data synthetic --emsize 8 --nhid 6 --nout 8 --nlevels 4 --batch_size 80 --aux_freq 2 --log-interval 5
--threads 1 --max_eval_tokens 500 --dropouth 0.1 --aux 0.1""".split()
HISTORY = "--horizon 4 --seq_len 44".split()
CARRIED = "--repack --seq_len 0 --horizon 40".split()
GROW = "--grow 1:1 2:1 --epochs 3".split()


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def train(folder, *flags):
    assert main([*map(str, flags), "--out", str(folder)]) == 0
    return checkpoint.load(folder / "last.pt")


def go_on(folder, *flags):
    assert main(["--resume", str(folder / "last.pt"), *map(str, flags)]) == 0
    return checkpoint.load(folder / "last.pt")


def records(folder, event):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["event"] == event]


def assert_same(ours, theirs):
    for key in ("model", "average", "optimizer", "carry", "rng", "step", "epoch", "schedule", "best"):
        assert checkpoint.sha256_of({key: ours[key]}) == checkpoint.sha256_of({key: theirs[key]}), key


# -- the schedule of depths --------------------------------------------------------------------------------------------


def test_stages_follow_each_other():
    stages = depth.read_stages(["2:3", "5:1"], 8, 6)
    assert [depth.depth_of(stages, epoch, 8) for epoch in range(7)] == [2, 2, 2, 5, 8, 8, 8]
    assert depth.read_stages([], 8, 1) == []
    with pytest.raises(UserError, match="expected LAYERS:EPOCHS"):
        depth.read_stages([f"2:{'1' * 5000}"], 8, 6)  # more digits than Python reads


@pytest.mark.parametrize(
    ("least", "nlevels", "expected"), [(2, 8, [2, 4, 6, 8]), (1, 2, [1, 2]), (3, 55, [3, 20, 38, 55])]
)
def test_few_depths_are_drawn_from_seed_and_update(least, nlevels, expected):
    assert depth.choices(least, nlevels) == expected
    drawn = [depth.draw(expected, 7, update) for update in range(200)]
    assert drawn == [depth.draw(expected, 7, update) for update in range(200)]
    assert set(drawn) == set(expected)
    assert drawn != [depth.draw(expected, 8, update) for update in range(200)]
    assert min(map(drawn.count, expected)) > 200 / len(expected) / 2


def _options(flags):
    config, _ = parse(Config, flags)
    return config.core.options(config)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--grow 4", "--grow 4: expected LAYERS:EPOCHS, such as 4:10, each at least 1"),
        ("--grow 0:1", "--grow 0:1: expected LAYERS:EPOCHS, such as 4:10, each at least 1"),
        ("--grow 2:1.5", "--grow 2:1.5: expected LAYERS:EPOCHS, such as 4:10, each at least 1"),
        ("--grow 1:1234567890", "--grow 1:1234567890: expected LAYERS:EPOCHS, such as 4:10, each at least 1"),
        (
            "--grow 5:1",
            "--grow 5:1: deeper than --nlevels 4, the depth after all stages; raise --nlevels (to score at another "
            "depth, pass --eval_nlevels)",
        ),
        (
            "--grow 1:1 2:2 --epochs 3",
            "--grow 1:1 2:2: its 3 epochs leave none of --epochs 3 for the 4 layers of --nlevels; shorten a stage or "
            "pass --epochs 4 or more",
        ),
        (
            "--random_depth 4",
            "--random_depth 4: expected less than --nlevels 4; lower it or raise --nlevels (to score at another depth, "
            "pass --eval_nlevels)",
        ),
        ("--random_depth 2 --grow 1:1", "--grow and --random_depth exclude each other: leave one of the two out"),
        (
            "--mixed_group 2 --nhid 8 --grow 1:1",
            "--mixed_group 2: the input climbs one group per layer and would not reach the output; begin --grow or "
            "--random_depth with 2 layers or more",
        ),
        (
            "--mixed_group 2 --nhid 8 --eval_depths 3 1",
            "--mixed_group 2: the input climbs one group per layer and would not reach the output of 1 layer; score "
            "with 2 layers or more",
        ),
        ("--model rhn --grow 1:1", "--grow: has no effect on --model rhn; leave it out"),
        (
            "--horizon auto --repack",
            "--horizon auto: with --repack it is the length of a window; pass a number or --no-repack",
        ),
        (
            "--horizon auto --seq_len 4",
            "--seq_len 4: must be larger than --horizon 4, or nothing is scored; increase it or pass --repack "
            "--seq_len 0",
        ),
        ("--model tcn --horizon auto", "--horizon auto: works only for a TrellisNet; pass a number with --model tcn"),
        ("--eval_depths 4 0", "--eval_depths: expected integers ≥ 1, got [4, 0]"),
        ("--eval_depths 100001", "--eval_depths: expected integers ≤ 100,000, got [100001]"),
        (
            "--eval_nlevels auto",
            "--eval_nlevels auto: has no depths to choose from; name some with --eval_depths, or pass 0",
        ),
        ("--eval_depths none 4", "argument --eval_depths: none stands alone, got none 4; see --help"),
        (
            "--grow 1:1 --finetune --load_weight w",
            "--grow: finetuning starts from trained weights, and could end before the last stage; pass --grow none",
        ),
    ],
)  # fmt: skip
def test_what_no_run_can_do_is_one_line(flags, message):
    flags = flags.split()
    small = [] if "--model" in flags else [*MODEL, *HISTORY, "--epochs", "3"]
    with pytest.raises(UserError) as e:
        _options([*small, *flags])
    assert str(e.value) == message


def test_lists_of_a_preset_can_be_emptied():
    flags = "--preset grow --grow none --eval_depths none --eval_nlevels 0 --random_depth 2".split()
    config, given = parse(Config, flags)
    assert (config.grow, config.eval_depths, given["grow"], config.depths()) == ([], [], [], [2, 4, 6, 8])
    assert parse(Config, "--model rhn --grow none".split())[0].grow == []
    assert check_settings(Config, {"grow": ["none"], "eval_depths": "none"}, "") == {"grow": [], "eval_depths": []}


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        [*HISTORY, "--lr", "5"],
        [*CARRIED, *"--optim Adam --lr 0.01 --ema 0.9".split()],
        pytest.param([*CARRIED, "--lr", "5", "--backend", "reference"], marks=pytest.mark.slow),
    ],
)
def test_a_schedule_equals_runs_that_are_stopped_and_go_on_at_the_next_depth(tmp_path, flags):
    """The second run has 2 layers; its checkpoint then says 4, and the rest is a run of 4 layers."""
    whole = train(tmp_path / "grow", *MODEL, *flags, *"--grow 2:1 --epochs 2".split())
    content = train(tmp_path / "parts", *MODEL, *flags, *"--nlevels 2 --epochs 1".split())
    content["settings"]["nlevels"] = 4
    content["best"] = None  # a score of another depth
    for name in ("best.pt", "config.json"):
        (tmp_path / "parts" / name).unlink()
    checkpoint.save(tmp_path / "parts" / "last.pt", content)
    again = go_on(tmp_path / "parts", "--epochs", 2)
    assert again["best"]["valid"]["loss"] == whole["best"]["valid"]["loss"]
    assert_same(again | {"best": whole["best"]}, whole)


@pytest.mark.parametrize(
    "flags",
    [
        [*GROW, "--horizon", "auto", "--seq_len", "44", "--lr", "5", "--anneal", "1", "--asgd"],
        pytest.param([*GROW, *CARRIED, *"--optim Adam --lr 0.01 --ema 0.9".split()], marks=pytest.mark.slow),
        ["--random_depth", "2", "--horizon", "auto", "--seq_len", "44", "--lr", "5", "--epochs", "2"],
    ],
    ids=["grow, horizon auto", "grow, carried", "random"],
)
def test_resumed_runs_of_changing_depth_are_bit_equal(tmp_path, flags):
    flags = [*MODEL, *flags]
    whole = train(tmp_path / "whole", *flags)
    an_epoch = whole["step"] // whole["epoch"]
    train(tmp_path / "parts", *flags, "--max_steps", an_epoch - 3)  # within a stage, at its end, beyond the next change
    for stop in (an_epoch, 2 * an_epoch - 1, 0):
        again = go_on(tmp_path / "parts", "--max_steps", stop)
    assert_same(again, whole)
    layers = [r.get("nlevels") for r in records(tmp_path / "whole", "epoch")]
    assert layers == ([1, 2, 4] if "--grow" in flags else [4, 4])
    assert records(tmp_path / "parts", "result")[-1]["test"] == records(tmp_path / "whole", "result")[-1]["test"]


def test_the_best_epoch_is_one_of_the_last_depth(tmp_path, monkeypatch, capsys):
    """No epoch is better than the one before it, so the best is the first of its depth."""
    monkeypatch.setattr(LanguageModeling, "is_better", lambda *_: False)
    train(tmp_path / "run", *MODEL, *HISTORY, *"--grow 1:1 2:2 --epochs 5 --lr 5".split())
    epochs, (result,) = (records(tmp_path / "run", event) for event in ("epoch", "result"))
    assert [r["best"] for r in epochs] == [True, True, False, True, False]
    assert (result["best_epoch"], result["test"]["nlevels"]) == (4, 4)
    assert result["valid"]["loss"] == epochs[3]["valid_loss"]
    assert "epoch   2  lr 5  2 layers  train" in capsys.readouterr().out


def test_a_run_that_is_stopped_at_a_lower_depth_is_scored_at_the_last(tmp_path, capsys):
    train(tmp_path / "run", *MODEL, *HISTORY, *GROW, "--lr", "5", "--max_steps", "25")
    (result,) = records(tmp_path / "run", "result")
    assert (result["best_epoch"], result["valid"]["nlevels"], result["test"]["nlevels"]) == (1, 4, 4)
    assert result["valid"]["loss"] != records(tmp_path / "run", "epoch")[0]["valid_loss"]
    notice = "NOTICE: so far the run was trained with 1 layer (--grow), but it is scored with 4; --eval_nlevels 1 gives"
    assert notice in capsys.readouterr().out
    for flags in (("--eval_nlevels", "1"), ("--eval_nlevels", "0", "--max_steps", "0")):
        go_on(tmp_path / "run", *flags)
        assert "NOTICE: so far" not in capsys.readouterr().out


def test_the_depth_of_a_run_that_is_yet_to_grow_is_reported(tmp_path, capsys):
    run, aside = tmp_path / "run", ("--eval", "--out", str(tmp_path / "scores"))
    train(run, *MODEL, *HISTORY, *GROW, "--max_steps", "25")
    notice = f"NOTICE: {run}: was trained with 1 layer, but this network has 4; pass --eval_nlevels 1 for the depth of"
    for more, said in (([], True), (["--eval_nlevels", "1"], False), (["--eval_nlevels", "4"], False)):
        capsys.readouterr()
        assert main(["--run", str(run), *aside, *more]) == 0
        assert (notice in capsys.readouterr().out) == said
    with pytest.warns(UserWarning, match=r"^so far the run was trained with 1 layer \(--grow\): the model has 4"):
        assert load_pretrained(run).model.core.num_layers == 4
    go_on(run, "--max_steps", "0", "--epochs", "3")
    capsys.readouterr()
    assert main(["--run", str(run), *aside]) == 0
    assert "NOTICE" not in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_pretrained(run).model.core.num_layers == 4


@pytest.mark.filterwarnings("ignore:the model sees only the last .* pixels")
def test_images_grow_too(tmp_path):
    flags = "--data synthetic --preset small --nhid 8 --batch_size 4 --max_eval_tokens 16 --max_steps 3 --threads 1"
    flags += " --grow 4:1 --epochs 2 --eval_depths 5 11"
    assert pmnist_main([*flags.split(), "--nlevels", "6", "--out", str(tmp_path)]) == 0
    (result,) = records(tmp_path, "result")
    assert [result[f"test_depth_{layers}"]["nlevels"] for layers in (5, 11)] == [5, 11]
    assert result["test"]["nlevels"] == 6


def test_a_rate_that_falls_until_a_number_of_updates_ends_the_run_there(tmp_path, monkeypatch):
    monkeypatch.setattr(LanguageModeling, "is_better", lambda *_: True)  # the last one
    out = [*"--metrics".split(), str(tmp_path / "m.json")]
    flags = "--grow 1:1 --epochs 9 --lr 5 --schedule cosine --max_steps 30".split()
    last = train(tmp_path / "run", *MODEL, "--max_eval_tokens", 0, *CARRIED, *flags, *out)
    epochs = records(tmp_path / "run", "epoch")
    assert [(r["finished"], r["best"], r["nlevels"]) for r in epochs] == [(True, True, 1), (False, True, 4)]
    assert (last["epoch"], last["step"], last["best"]["epoch"]) == (1, 30, 2)
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert (metrics["complete"], metrics["best_epoch"], metrics["steps"]) == (True, 2, 30)
    assert metrics["valid"]["loss"] == pytest.approx(epochs[1]["valid_loss"])
    assert_same(go_on(tmp_path / "run"), last)
    assert records(tmp_path / "run", "result")[0] == records(tmp_path / "run", "result")[1]


# -- windows -----------------------------------------------------------------------------------------------------------


def language_model(num_layers, **options):
    torch.manual_seed(0)
    model = TrellisLanguageModel(11, 4, 6, num_layers, output_size=4, **options).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


def test_context_follows_the_depth_and_targets_stay():
    rows = torch.randint(11, (2, 50))
    model = language_model(6, dilation=(1, 2), kernel_size=3)
    task = LanguageModeling(model, horizon=None, seq_len=30, aux_weight=0.3, aux_every=2)
    full = task.batches(rows)
    assert task.horizon == model.core.reach == 18
    scored = [targets[:, 18:] for _, targets in full]
    for layers in (1, 3, 6):
        model.core.num_layers = layers
        context = model.core.reach
        assert task.training_windows.context == context
        again = task.batches(rows)
        for (inputs, targets), (now, _), expected in zip(again, full, scored, strict=True):
            assert torch.equal(inputs, now)  # a window cut after the change has the new length
            assert torch.equal(targets[:, context:], expected)
            assert task.size((inputs, targets)) == expected.numel()
        other = LanguageModeling(model, horizon=context, seq_len=context + 12, aux_weight=0.3, aux_every=2)
        ours, theirs = task.loss(*again[1])[0], other.loss(*other.batches(rows[:, 18 - context :])[1])[0]
        assert_close(ours, theirs, rtol=0, atol=0)
        assert (ours["aux"] > 0) == (layers >= 2)


def test_a_horizon_that_follows_the_depth_carries_no_state():
    with pytest.raises(ValueError, match="^horizon: expected a number with repackage, got None$"):
        LanguageModeling(language_model(2), horizon=None, repackage=True)
    message = "^horizon: expected a number, got None; this core has no reach to take it from$"
    for core in (AWDLSTM, EquilibriumTrellisNet):
        with pytest.raises(ValueError, match=message):
            LanguageModeling(TrellisLanguageModel(11, 4, 6, 2, output_size=4, core=core), horizon=None, seq_len=30)


# -- scores ------------------------------------------------------------------------------------------------------------

HEADS = {"softmax": {}, "mixture": {"n_experts": 3, "tied": False}, "split": {"cutoffs": [3, 7]}}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("windows", [{"seq_len": 20}, {"seq_len": 14}, {"repackage": True}])
def test_every_depth_scores_as_a_network_of_this_depth(head, windows):
    rows, depths = torch.randint(11, (3, 61)), [2, 8, 5]
    model = language_model(4, **head)
    task = LanguageModeling(model, horizon=9, **windows)
    for how in ({}, {"max_tokens": 40}):
        results = task.evaluate_depths(rows, depths, **how)
        for layers, result in zip(depths, results, strict=True):
            built = language_model(layers, **head)
            expected = LanguageModeling(built, horizon=9, **windows).evaluate(rows, **how)
            assert result["tokens"] == expected["tokens"]
            assert_close(result["loss"], expected["loss"], **EXACT)
        assert model.core.num_layers == 4
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    task.evaluate_depths(rows, depths)
    windows = len(task.evaluation_windows.starts(rows.size(1)))
    assert len(passes) == windows * (3 if task.evaluation_windows.carried else 1)


def test_scores_of_all_depths_come_from_one_evaluation(monkeypatch):
    rows, task = torch.randint(11, (3, 61)), LanguageModeling(language_model(4), horizon=9, seq_len=20)
    calls, original = [], task.evaluate_depths
    monkeypatch.setattr(task, "evaluate_depths", lambda *args, **how: calls.append(1) or original(*args, **how))
    scores = depth_scores(task, [2, 5], {"valid": rows, "test": rows[:2]})
    assert list(scores) == ["valid_depth_2", "valid_depth_5", "test_depth_2", "test_depth_5"]
    for name, (method, data) in scores.items():
        result, layers = method(data), int(name[-1])
        assert (result["nlevels"], result["receptive_field"]) == (layers, layers + 1)
        with at_depth(task.model, layers):
            assert_close(result["loss"], task.evaluate(data)["loss"], **EXACT)
    assert len(calls) == 2


def test_the_depth_of_scores_is_chosen_on_validation_data():
    rows, task = torch.randint(11, (3, 61)), LanguageModeling(language_model(4), horizon=9, seq_len=20)
    losses = dict(zip((1, 2, 3), (r["loss"] for r in task.evaluate_depths(rows, [1, 2, 3])), strict=True))
    assert set_depth(task, []) is None
    assert set_depth(task, [2]) is None
    assert task.model.core.num_layers == 2
    result = set_depth(task, [1, 2, 3])(rows)
    best = min(losses, key=losses.get)
    assert (task.model.core.num_layers, result["loss"]) == (best, losses[best])


@pytest.mark.parametrize("worthless", [math.nan, math.inf])
def test_a_depth_without_a_finite_loss_is_never_chosen(monkeypatch, worthless):
    task = LanguageModeling(language_model(4), horizon=9, seq_len=20)
    losses = [worthless, 5.0, worthless, 4.0, 4.5, worthless]
    monkeypatch.setattr(task, "evaluate_depths", lambda *_: [{"loss": loss} for loss in losses])
    assert set_depth(task, range(1, 7))(None) == {"loss": 4.0}
    assert task.model.core.num_layers == 4


def test_a_finished_run_is_recorded_even_if_a_depth_cannot_be_scored(tmp_path, monkeypatch, capsys):
    evaluate_depths = LanguageModeling.evaluate_depths

    def diverging(self, rows, depths, **how):
        results = evaluate_depths(self, rows, depths, **how)
        return [r | {"loss": math.inf} if depth == 8 else r for r, depth in zip(results, depths, strict=True)]

    monkeypatch.setattr(LanguageModeling, "evaluate_depths", diverging)
    where = tmp_path / "metrics.json"
    flags = [*MODEL, *CARRIED, *"--lr 5 --max_steps 9 --epochs 1 --eval_depths 2 8 --metrics".split(), str(where)]
    assert main([*flags, "--out", str(tmp_path / "run")]) == 1
    reason = "the valid_depth_8 loss is inf, ppl inf; leave this score out"
    rest = f"valid_depth_8 was not finished; the scores before it are in {where}"
    assert capsys.readouterr().err.splitlines()[-1] == f"failed: {reason}; {rest}"
    metrics = json.loads(where.read_text())
    (result,) = records(tmp_path / "run", "result")
    for record in (metrics, result):
        assert record["test"]["loss"] > 0
        assert [name for name in record if "_depth_" in name] == ["valid_depth_2"]
    assert not metrics["complete"]
    assert "unfinished" not in metrics
    assert load_pretrained(tmp_path / "run").model.core.num_layers == 4


def test_scores_of_a_run_by_depth(tmp_path, capsys):
    flags = [*MODEL, *CARRIED, *"--lr 5 --max_steps 9 --epochs 1".split()]
    train(tmp_path / "run", *flags, *"--eval_depths 8 2 --eval_nlevels auto".split())
    (result,) = records(tmp_path / "run", "result")
    candidates = {layers: result[f"valid_depth_{layers}"]["loss"] for layers in (2, 8)}
    layers = result["test"]["nlevels"]
    assert layers in (2, 4, 8)
    assert result["valid"]["loss"] <= min(candidates.values())
    if layers in candidates:
        assert result["test"]["loss"] == pytest.approx(result[f"test_depth_{layers}"]["loss"], rel=1e-6)

    scored = "--eval --threads 1 --max_eval_tokens 500 --metrics".split()
    run = ["--run", str(tmp_path / "run"), *scored, str(tmp_path / "m.json")]
    capsys.readouterr()
    assert main([*run, "--eval_nlevels", "2", "--eval_depths", "2", "3"]) == 0
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["test"]["loss"] == metrics["test_depth_2"]["loss"]
    assert "test_depth_3 ppl" in (out := capsys.readouterr().out)
    assert "tokens  3 layers" in out
    assert (metrics["test_depth_3"]["receptive_field"], metrics["test"]["nlevels"]) == (4, 2)


def test_a_loaded_run_has_the_depth_that_its_scores_have(tmp_path):
    flags = [*MODEL, *CARRIED, *"--lr 5 --max_steps 2 --epochs 1".split()]
    train(tmp_path / "run", *flags, "--eval_nlevels", "7")
    assert load_pretrained(tmp_path / "run").model.core.num_layers == 7
    train(tmp_path / "grown", *flags, *"--grow 2:1 --epochs 2".split())
    assert load_pretrained(tmp_path / "grown").model.core.num_layers == 4
    train(tmp_path / "chosen", *flags, *"--eval_depths 2 6 --eval_nlevels auto".split())
    with pytest.warns(UserWarning, match="chose the depth .* the model has 4 layers"):
        assert load_pretrained(tmp_path / "chosen").model.core.num_layers == 4


def test_kept_passes_are_those_of_one_depth(tmp_path, capsys):
    flags = [*MODEL, *CARRIED, *"--dropout 0.3 --lr 5 --max_steps 5 --epochs 1".split()]
    train(tmp_path / "run", *flags)
    scored = "--eval --threads 1 --mc_dropout 2 --eval_nlevels".split()
    run = ["--run", str(tmp_path / "run"), "--mc_file", str(tmp_path / "passes"), *scored]
    assert main([*run, "2"]) == 0
    assert main([*run, "8"]) == 2
    assert main([*run, "0", "--nlevels", "2"]) == 2  # which may cut other windows, with --horizon auto
    assert capsys.readouterr().err.count("holds passes with other weights, data or settings") == 2
    assert main([*run, "2"]) == 0


# -- early exit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [{"seq_len": 20}, {"repackage": True}])
def test_without_a_tolerance_an_exit_scores_exact_histories(windows):
    rows, model = torch.randint(11, (3, 61)), language_model(4)
    task = LanguageModeling(model, horizon=9, **windows)
    context = task.evaluation_windows.context
    result = task.evaluate_exit(rows, tolerance=0.0)
    expected = task.evaluate(rows, windows=Windows(context, 60 - context))
    assert (result["tokens"], result["layers"]) == (expected["tokens"], 4)
    assert_close(result["loss"], expected["loss"], **EXACT)
    with torch.no_grad():
        for p in model.core.parameters():
            p.mul_(0.1)
    model.core.num_layers = 20
    exact, early = (task.evaluate_exit(rows, tolerance=share) for share in (0.0, 0.05))
    assert early["layers"] < exact["layers"] == 20
    assert early["loss"] == pytest.approx(exact["loss"], rel=1e-2)


def test_weights_that_were_trained_with_other_layers_are_reported(run_folder, sizes, tmp_path, capsys):
    at = sizes.index("--nlevels")
    flags = [*sizes[:at], *sizes[at + 2 :], *"--eval --max_eval_tokens 20 --threads 1 --load_weight".split()]
    notice = f"NOTICE: {run_folder}: was trained with 3 layers, but this network has 58; pass --nlevels 3 for"
    for more, said in (([], True), (["--nlevels", "3"], False), (["--nlevels", "4"], False)):
        assert main([*flags, str(run_folder), *more]) == 0
        assert (notice in capsys.readouterr().out) == said
    solved = shutil.copytree(run_folder, tmp_path / "solved")
    content = json.loads((solved / "config.json").read_text())
    content["settings"]["equilibrium"] = True
    (solved / "config.json").write_text(json.dumps(content))
    notice = f"NOTICE: {solved}: was trained at the equilibrium, but this network has 58 layers; pass --equilibrium"
    for more, said in (([], True), (["--nlevels", "3"], False), (["--no-equilibrium"], False)):
        assert main([*flags, str(solved), *more]) == 0
        assert (notice in capsys.readouterr().out) == said


def test_a_run_is_scored_with_early_exit(run_folder, tmp_path, capsys):
    run = ["--run", str(run_folder), "--metrics", str(tmp_path / "m")]
    assert main([*run, *"--eval --threads 1 --early_exit 0.1 0.10000001".split()]) == 0
    metrics = json.loads((tmp_path / "m").read_text())
    exits = ["test_exit_0", "test_exit_0.1", "test_exit_0.10000001"]
    assert [key for key in metrics if key.startswith("test_exit")] == exits
    exact, early = metrics["test_exit_0"], metrics["test_exit_0.1"]
    assert exact["layers"] == 3
    assert 1 < early["layers"] <= 3
    assert (early["tolerance"], early["seconds"] > 0) == (0.1, True)
    assert "layers computed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--early_exit 0.1", "--early_exit: scores trained weights; pass --eval and --load_weight FILE"),
        ("--eval --data synthetic --early_exit 1", "--early_exit 1: expected shares in [0, 1), such as 0.1"),
        (
            "--eval --data synthetic --model rhn --early_exit 0.1",
            "--early_exit: has no effect on --model rhn; leave it out",
        ),
    ],
)  # fmt: skip
def test_exits_that_are_refused(flags, message):
    with pytest.raises(UserError) as e:
        parse(Config, flags.split())
    assert str(e.value) == message
