"""The scripts that train tables: every row trains, finished rows are skipped, interrupted ones resumed."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from scripts.reports.tables import GROWTH
from trellisnet.models import count_parameters
from trellisnet.training import programs
from trellisnet.training.config import PROJECT, parse
from word_ptb.model import Config, build_model

TABLES = [1, 2, 3, 4, 6]


def table(number, root=PROJECT, **environment):
    return script(f"table{number}", root, **environment)


def script(name, root=PROJECT, **environment):
    command = ["bash", str(root / "scripts" / f"{name}.sh")]
    environment = {**os.environ, "PY": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def rows_of(name):
    text = (PROJECT / "scripts" / f"{name}.sh").read_text()
    return text.replace("\\\n", " ").rsplit("\nrows ", 1)[1].splitlines()[0].split()


@pytest.fixture
def smoke(tmp_path):
    """Train rows of a script for a few steps, in this process, with the flags that a stub of Python received."""
    shutil.copytree(PROJECT / "scripts", tmp_path / "scripts")
    (tmp_path / "python").write_text(f'#!/bin/sh\n(IFS="\t"; echo "$*") >>{tmp_path}/calls\n')
    (tmp_path / "python").chmod(0o755)

    def train(name, rows):
        done = script(name, tmp_path, SMOKE="1", ROWS=" ".join(rows), PY=str(tmp_path / "python"))
        assert done.returncode == 0, done.stderr
        calls = (tmp_path / "calls").read_text().splitlines()
        for row, (program, *flags) in zip(rows, (call.split("\t") for call in calls), strict=True):
            assert f"{row}, seed 1111: python " in done.stdout
            assert programs.get(Path(program).parent.name).main(flags) == 0
            metrics = json.loads(Path(flags[flags.index("--metrics") + 1]).read_text())
            assert (metrics["corpus"], metrics["steps"], metrics["complete"]) == ("synthetic", 2, False)

    return train


@pytest.mark.parametrize(
    "name",
    [
        *(f"table{number}" for number in TABLES),
        "sparse_table",
        "wikipedia_table",
        "rhn_table",
        "recipe",
        "compare",
        "depth",
        "equilibrium",
    ],
)
def test_smoke(smoke, name):
    few = {"rhn_table": ["depth_3", "depth_1_untied"], "table4": ["permuted_mnist", "permuted_mnist_tcn"]}
    few["recipe"] = ["augment"]
    few["equilibrium"] = ["unrolled", "equilibrium", "timed_equilibrium", "paper_recompute"]  # others only score
    smoke(name, few.get(name) or rows_of(name))


@pytest.mark.parametrize("smoked", ["", "1"])
@pytest.mark.parametrize(
    "name",
    [
        *(f"table{number}" for number in TABLES),
        *("sparse_table", "wikipedia_table", "rhn_table", "recipe", "depth", "equilibrium"),
    ],
)
def test_the_flags_of_every_row_are_valid(name, smoked, tmp_path):
    """Parse the flags that are printed, and build the models on the meta device."""
    shutil.copytree(PROJECT / "scripts", tmp_path / "scripts")
    (tmp_path / "python").write_text(
        '#!/bin/sh\nfor last; do :; done\nmkdir -p "${last%/*}" && echo \'"complete": true\' >"$last"\n'  # --metrics
    )
    (tmp_path / "python").chmod(0o755)
    done = script(name, tmp_path, SMOKE=smoked, PY=str(tmp_path / "python"))
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"seed 1111: python (\w+)/train.py (.*)", done.stdout)
    assert len(lines) == (20 if name == "rhn_table" else len(rows_of(name)))
    for task, flags in lines:
        program = programs.get(task)
        config, _ = parse(program.config_class, flags.split())
        sizes = [3, 10] if task in ("pmnist", "cifar10") else [100_000 if task == "wt103" else 1000]
        with torch.device("meta"):
            assert count_parameters(program.build_model(config, *sizes)) > 0


def test_every_depth_has_two_rows():
    done = script("rhn_table", ROWS="nothing")
    assert done.returncode == 2
    known = done.stderr.split("it has: ")[1].split()
    assert known == [f"depth_{depth}{suffix}" for depth in range(1, 11) for suffix in ("", "_untied")]


@pytest.mark.slow
def test_a_comparison_measures_once_and_keeps_its_choices(tmp_path):
    """An update of this train.py takes 4 seconds in fp32, 2 in bfloat16, half with 2 layers; 300 make an epoch."""
    shutil.copytree(PROJECT / "scripts", tmp_path / "scripts")
    (tmp_path / "word_ptb").mkdir()
    (tmp_path / "word_ptb" / "train.py").write_text(
        "import json, pathlib, sys\n"
        "argv = sys.argv[1:]\n"
        "out = pathlib.Path(argv[argv.index('--out') + 1])\n"
        "out.mkdir(parents=True, exist_ok=True)\n"
        "with (out.parents[1] / 'calls').open('a') as file: file.write(' '.join(argv[:argv.index('--out')]) + '\\n')\n"
        "(out / 'config.json').write_text(json.dumps({'steps an epoch': 300}))\n"
        "seconds = (200.0 if 'bf16' in argv else 400.0) / (1 + ('--nlevels' in argv))\n"
        "record = {'event': 'epoch', 'step': 100, 'train_seconds': seconds}\n"
        "(out / 'metrics.jsonl').write_text(json.dumps(record) + '\\n')\n"
        "done = {'complete': True, 'corpus': 'real', 'commit': 'a', 'params': 7, 'epochs': 6, 'data': 'd'}\n"
        "done |= {'preset': 'rhn-small', 'seconds': 3600.0, 'test': {'ppl': 99.0, 'loss': 4.6}}\n"
        "if '--metrics' in argv: pathlib.Path(argv[-1]).write_text(json.dumps(done, indent=1))\n"
    )
    for _ in range(2):
        done = script("compare", tmp_path, ROWS="rhn")
        assert done.returncode == 0, done.stderr
    assert "| Recurrent highway network | 99.00 (n = 1, 6 epochs) | 7 | 60 |" in done.stdout
    folder = tmp_path / "runs" / "tables" / "compare-60-minutes"
    *measured, trained = (folder / "calls").read_text().splitlines()
    rest = "--max_steps 300 --max_eval_tokens 1 --overwrite"
    assert measured == [f"--model rhn --preset small --precision {p} {rest}" for p in ("fp32", "bf16")]
    fixed = "--model rhn --preset small --precision bf16 --epochs 1000 --schedule cosine --max_steps 1751"
    assert trained == f"{fixed} --seed 1111 --overwrite"

    done = script("compare", tmp_path, ROWS="grown")
    assert done.returncode == 0, done.stderr
    *_, shallow, trained = (folder / "calls").read_text().splitlines()
    grown = "--model trellisnet --preset small --horizon 4 --batch_size 75 --precision bf16"
    assert shallow == f"{grown} --nlevels 4 {rest}"
    # Validation leaves 3,503 seconds, half of them 5.8 epochs with 4 layers; 6 leave 851 updates with all layers.
    assert trained == f"{grown} --epochs 1000 --schedule cosine --max_steps 2651 --grow 4:6 --seed 1111 --overwrite"


@pytest.fixture
def stub(tmp_path):
    """The scripts beside a train.py that only notes its arguments; FAIL and PARTLY make it break off."""
    shutil.copytree(PROJECT / "scripts", tmp_path / "scripts")
    (tmp_path / "char_ptb").mkdir()
    (tmp_path / "char_ptb" / "train.py").write_text(
        "import json, os, pathlib, sys\n"
        "argv = sys.argv[1:]\n"
        "out = pathlib.Path(argv[argv.index('--out') + 1])\n"
        "out.mkdir(parents=True, exist_ok=True)\n"
        "with (out / 'calls').open('a') as file: file.write(' '.join(argv[:argv.index('--out')]) + '\\n')\n"
        "if os.environ.get('FAIL') == 'late': (out / 'last.pt').touch()\n"
        "if os.environ.get('FAIL'): sys.exit(1)\n"
        "complete = not os.environ.get('PARTLY')\n"
        "if not complete: (out / 'last.pt').touch()\n"
        "pathlib.Path(argv[argv.index('--metrics') + 1]).write_text(json.dumps({'complete': complete}, indent=1))\n"
    )
    return tmp_path


def test_seeds_rows_and_further_flags(stub):
    done = table(3, stub, SEEDS="1 2", ROWS="trellisnet", ARGS="--accumulate 4")
    assert done.returncode == 0, done.stderr
    runs = stub / "runs" / "tables" / "table3"
    assert [p.name for p in runs.iterdir()] == ["trellisnet"]
    for seed in ("1", "2"):
        call = (runs / "trellisnet" / f"seed-{seed}" / "calls").read_text()
        assert call == f"--preset paper --seed {seed} --overwrite --accumulate 4\n"
    done = table(3, stub, ROWS="nothing")
    assert done.returncode == 2
    assert done.stderr == "error: table3 has no row nothing; it has: trellisnet trellisnet_standard tcn awd_lstm\n"


def test_an_exported_cdpath_does_not_lead_elsewhere(stub):
    """With it, `cd` may go to another folder, and prints where it went."""
    (stub / "elsewhere" / "scripts").mkdir(parents=True)
    environment = {**os.environ, "PY": sys.executable, "ROWS": "trellisnet", "CDPATH": str(stub / "elsewhere")}
    command = ["bash", "scripts/table3.sh"]
    done = subprocess.run(command, cwd=stub, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (stub / "runs" / "tables" / "table3" / "trellisnet" / "seed-1111" / "calls").is_file()


def test_finished_rows_are_skipped_and_interrupted_ones_continued(stub):
    assert table(3, stub, ROWS="trellisnet", FAIL="early").returncode == 1
    assert table(3, stub, ROWS="trellisnet", FAIL="late").returncode == 1
    assert table(3, stub, ROWS="trellisnet", PARTLY="1").returncode == 0
    done = table(3, stub)
    assert done.returncode == 0, done.stderr
    runs = stub / "runs" / "tables" / "table3"
    calls = (runs / "trellisnet" / "seed-1111" / "calls").read_text().splitlines()
    start, on = "--preset paper --seed 1111 --overwrite", "--resume"
    assert calls == [start, start, on, on]
    (runs / "tcn" / "seed-1111" / "metrics.json").unlink()
    (runs / "tcn" / "seed-1111" / "best.pt").touch()  # as a full disk may leave it, without last.pt
    assert table(3, stub, ROWS="tcn").returncode == 0
    assert (runs / "tcn" / "seed-1111" / "calls").read_text().splitlines()[1:] == [on]
    again = table(3, stub)
    assert again.stdout.splitlines() == [
        f"table3 {row}, seed 1111: finished" for row in ("trellisnet", "trellisnet_standard", "tcn", "awd_lstm")
    ]
    assert len((runs / "trellisnet_standard" / "seed-1111" / "calls").read_text().splitlines()) == 1


def test_finetuning_waits_for_the_row_that_it_starts_from(stub):
    (stub / "char_ptb").rename(stub / "word_ptb")
    rows = {"ROWS": "dense dense_finetuned", "SEEDS": "7"}
    done = script("sparse_table", stub, ROWS="dense_finetuned", SEEDS="7")
    assert (done.returncode, "seed 7: starts from the row dense, which is not finished" in done.stderr) == (2, True)
    assert script("sparse_table", stub, **rows, PARTLY="1").returncode == 2
    done = script("sparse_table", stub, **rows)
    assert done.returncode == 0, done.stderr
    runs = stub / "runs" / "tables" / "sparse_table"
    (call,) = (runs / "dense_finetuned" / "seed-7" / "calls").read_text().splitlines()
    assert call == (
        f"--model awd-lstm --preset finetune --min_epochs 100 --seed 7 --load_weight {runs}/dense/seed-7 --overwrite"
    )


def test_rows_at_equal_steps(stub):
    runs = stub / "runs" / "tables" / "table3-70-steps"
    assert table(3, stub, STEPS="70", ROWS="trellisnet", PARTLY="1", FAIL="late").returncode == 1
    assert table(3, stub, STEPS="70", ROWS="trellisnet", PARTLY="1").returncode == 0
    calls = (runs / "trellisnet" / "seed-1111" / "calls").read_text().splitlines()
    assert calls == ["--preset paper --seed 1111 --max_steps 70 --overwrite", "--resume --max_steps 70"]
    metrics = runs / "trellisnet" / "seed-1111" / "metrics.json"
    metrics.write_text(json.dumps({"complete": False, "steps": 70, "seed": 1}, indent=1))
    again = table(3, stub, STEPS="70", ROWS="trellisnet")
    assert again.stdout == "table3 trellisnet, seed 1111: finished\n"
    metrics.write_text(json.dumps({"complete": False, "steps": 7, "seed": 1}, indent=1))
    assert table(3, stub, STEPS="70", ROWS="trellisnet").stdout.startswith("table3 trellisnet, seed 1111: python")


def test_a_row_that_ends_after_a_few_updates_is_not_scored_again(stub):
    """The memory of a process that only scores once replaced that of training in its record."""
    (stub / "char_ptb").rename(stub / "word_ptb")
    row = {"ROWS": "paper_unrolled"}
    assert script("equilibrium", stub, **row, PARTLY="1").returncode == 0
    metrics = stub / "runs" / "tables" / "equilibrium" / "paper_unrolled" / "seed-1111" / "metrics.json"
    metrics.write_text(json.dumps({"complete": False, "steps": 2, "seed": 1}, indent=1))
    assert script("equilibrium", stub, **row).stdout == "equilibrium paper_unrolled, seed 1111: finished\n"
    for longer in ("--max_steps 4", "--max_steps=4"):
        done = script("equilibrium", stub, **row, ARGS=longer, PARTLY="1")
        assert f"--resume {longer}\n" in done.stdout
        metrics.write_text(json.dumps({"complete": False, "steps": 2, "seed": 1}, indent=1))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("STEPS", "0", "STEPS=0: expected a number of updates, 1 or more"),
        ("STEPS", "-1", "STEPS=-1: expected a number of updates, 1 or more"),
        ("STEPS", "many", "STEPS=many: expected a number of updates, 1 or more"),
        ("SEEDS", "1,2", "SEEDS=1,2: expected whole numbers with spaces between them"),
        ("SMOKE", "0", "SMOKE=0: expected 1, or nothing"),
        ("PY", "/no/python", "PY=/no/python: no such program"),
        (
            "ROWS",
            "trellisnet nothing",
            "table3 has no row nothing; it has: trellisnet trellisnet_standard tcn awd_lstm",
        ),
    ],
)
def test_variables_are_checked_before_training(stub, name, value, message):
    refused = table(3, stub, **{name: value})
    assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", f"error: {message}\n")
    assert not (stub / "runs").exists()


def test_a_comparison_whose_measurement_fails_trains_nothing(stub):
    (stub / "char_ptb").rename(stub / "word_ptb")
    for _ in range(2):  # nor does it keep anything
        done = script("compare", stub, ROWS="rhn", FAIL="early")
        assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    (called,) = (stub / "runs").rglob("calls")
    assert called.parent.name == "probe-fp32"
    assert len(called.read_text().splitlines()) == 2


@pytest.mark.parametrize("minutes", ["x", "0", "-5", "1.5"])
def test_minutes_are_checked_before_training(stub, minutes):
    refused = script("compare", stub, MINUTES=minutes)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"error: MINUTES={minutes}: expected a number of minutes, 1 or more\n"


def test_a_missing_python_is_named(tmp_path):
    shutil.copytree(PROJECT / "scripts", tmp_path / "scripts")
    done = script("demo", tmp_path, PYTHON="no-such-python")
    assert done.returncode == 2
    assert done.stderr == ("error: no-such-python: no such program; name a Python of 3.11 or newer with PYTHON=...\n")


@pytest.mark.parametrize(
    ("flags", "paper", "small"),
    [
        ("--mixed_group 2 --nhid {}", 1940, 312),
        ("--mixed_group 4 --nhid {}", 2772, 520),
        ("--activation gru --nhid {}", 1244, 158),
        ("--activation tanh --nhid {}", 2581, 481),
    ],
)
def test_rows_of_table_6_have_the_size_of_the_dense_network(flags, paper, small):
    script = (PROJECT / "scripts" / "table6.sh").read_text()
    for preset, nhid, dense in (("paper", paper, 24_175_600), ("small", small, 3_211_200)):
        assert f"={nhid}" in script.split(f"\n{preset})", 1)[1].split(";;", 1)[0]
        config, _ = parse(Config, ["--preset", preset, *flags.format(nhid).split()])
        assert count_parameters(build_model(config, 10_000)) == pytest.approx(dense, rel=1e-3)


@pytest.mark.parametrize("text", GROWTH)
def test_growing_and_fixed_plans_cost_equally_much(text):
    """The multiply-adds of a token are the entries of its kernels, once per use, and of the softmax."""
    outside, layer, plans = GROWTH[text]
    rows = (PROJECT / "scripts" / "depth.sh").read_text()
    program = programs.get(f"{text}_ptb")
    flags = re.search(rf"^{text}\(\) {{ plan {text}_ptb (.*) \"\$@\"; }}$", rows, re.M)[1].split()
    config, _ = parse(program.config_class, ["--preset", "small", *flags])
    tokens = config.horizon * config.batch_size
    model = program.build_model(config, {"word": 10_000, "char": 50}[text])
    kernels = (model.core.effective_weight(name).numel() for name in ("weight_x", "weight_h"))
    assert [next(kernels) + model.head.weight.numel(), next(kernels)] == [outside, layer]
    costs = []
    for plan, epochs in plans.items():
        own = re.search(rf"^{text}_{plan}\(\) {{ {text} (.*); }}$", rows, re.M)[1].split()
        config, _ = parse(program.config_class, ["--preset", "small", *flags, *own])
        assert (config.horizon == 8) == (plan == "windows")
        assert config.horizon * config.batch_size == pytest.approx(tokens, rel=0.02)
        layers = [config.depth(epoch) or config.nlevels for epoch in range(config.epochs)]
        assert Counter(layers) == epochs
        costs.append(sum(outside + n * layer for n in layers))
    assert costs == pytest.approx([costs[0]] * len(costs), rel=0.03)
