"""scripts/collect.py: RESULTS.md, the blocks of all README.md, the papers' tables, and the records that are refused."""

import json
import os
import re

import pytest

from cases import committed
from scripts import collect
from scripts.reports.pages import PAGES
from scripts.reports.tables import COMPARED, PUBLISHED, TABLES, TAGGED, WEIGHTS
from trellisnet.training.config import PROJECT

METRICS = {
    "task": "word_ptb", "preset": "small", "command": "python word_ptb/train.py --preset small", "version": "0.1.0",
    "commit": "0123456789ab", "params": 123456, "data": "f" * 64, "corpus": "Penn Treebank", "epochs": 2, "steps": 20,
    "best_epoch": 2, "complete": True, "valid": {"loss": 4.8, "ppl": 121.51, "tokens": 73044},
    "test": {"loss": 4.7, "ppl": 109.95, "tokens": 81720}, "seconds": 3600.0, "device": "cpu",
    "machine": "CPU, 2 cores", "threads": 2, "precision": "fp32", "backend": "reference", "seed": 1111,
    "torch": "2.13.0", "train": {"tokens": 5000}, "load_weight": "",
}  # fmt: skip
EXPORTED = {
    "task": "word_ptb", "preset": "small", "params": 123456, "dtype": "float16", "bytes": 250_000, "commit": "0123",
    "valid": METRICS["valid"], "test": METRICS["test"], "precision": "fp32", "corpus": "Penn Treebank",
    "data": "f" * 64,
}  # fmt: skip


def write_run(folder, metrics):
    """Write the three files of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    epoch = {"event": "epoch", "lr": 20.0, "finished": True, "best": True, "count": 5000, "train_seconds": 100.0}
    epochs = [epoch | {"epoch": i, "train_score": 300 / i, "valid_score": 250 / i, "seconds": 60 * i} for i in (1, 2)]
    result = {"event": "result", "step": 20, **{key: metrics[key] for key in ("valid", "test", "best_epoch")}}
    lines = map(json.dumps, [{"event": "train", "loss": 5}, *epochs, result])
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "log.txt").write_text("for readers\n")


@pytest.fixture
def root(tmp_path):
    def write(**changes):
        write_run(tmp_path / "results" / "one", METRICS | changes)
        (tmp_path / "README.md").write_text("hello\n")
        return tmp_path

    return write


def test_a_section_has_all_facts_of_a_run(root):
    folder = root()
    assert collect.main(["--root", str(folder)]) == 0
    text = (folder / "RESULTS.md").read_text()
    quoted = ["109.95", "121.51", "56.97", f"`{METRICS['command']}`", "0123456789ab", "CPU, 2 cores", "1111"]
    for part in [*quoted, "Penn Treebank", "| 2 | 20 | 150.00 | 125.00 | 2.0 |", "60 minutes"]:
        assert part in text
    assert collect.main(["--root", str(folder), "--check"]) == 0
    (folder / "RESULTS.md").write_text(text.replace("109.95", "99.95"))
    assert collect.main(["--root", str(folder), "--check"]) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"complete": False}, "not a complete run"),
        ({"epochs": 3}, "not a complete run"),
        ({"corpus": "synthetic"}, "a run on synthetic data is no result"),
        ({"corpus": "enwik8"}, "the paper has no score on enwik8; use a folder for short runs"),
        ({"task": "cifar10", "permute": True}, "the paper has no score on permuted CIFAR-10; use a folder for short"),
        ({"test": METRICS["test"] | {"init_tail": True}}, "its scores are those of tail vectors that were not trained"),
        ({"commit": "0123456789ab-dirty"}, "the code was not committed"),
        ({"commit": None}, "the code was not committed"),
        ({"command": "python word_ptb/train.py --data /home/me/penn"}, "names a path of one machine"),
        ({"test": {}}, "corrupt or of another kind (it has no 'score')"),
        ({"seconds": None}, "corrupt or of another kind (unsupported operand"),
        ({"machine": "CPU\x1b[2J"}, "a text with control characters: CPU\\x1b[2J"),
        ({"command": "two\nlines"}, "a text with control characters: two\\nlines"),
    ],
)
def test_unquotable_runs_are_refused(root, capsys, changes, message):
    folder = root(**changes)
    assert collect.main(["--root", str(folder)]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "RESULTS.md").exists()


def test_files_of_different_runs_are_refused(root, capsys):
    folder = root()
    one, exported = folder / "results" / "one", EXPORTED | {"before_rounding": {"valid": METRICS["valid"], "test": {}}}
    for name, content, message in (
        ("weights.json", exported, "weights.json: of another run than metrics.json beside it; export the run again"),
        ("weights.json", EXPORTED | {"params": 7}, "weights.json: of another run than metrics.json beside it"),
        (
            "metrics.json",
            METRICS | {"test": METRICS["test"] | {"ppl": 99.9}},
            "one: metrics.json and metrics.jsonl are",
        ),
    ):
        (one / name).write_text(json.dumps(content))
        assert collect.main(["--root", str(folder)]) == 2
        assert message in capsys.readouterr().err
        (one / "weights.json").unlink(missing_ok=True)


def test_a_result_of_an_earlier_version_is_refused(root, capsys):
    folder = root()
    path = folder / "results" / "one" / "metrics.json"
    path.write_text(json.dumps({key: value for key, value in METRICS.items() if key != "load_weight"}))
    assert collect.main(["--root", str(folder)]) == 2
    assert "one: recorded by version 0.1.0, which left fields out; train it again\n" in capsys.readouterr().err


def test_a_named_pipe_is_refused(root, capsys):
    folder = root()
    path = folder / "results" / "one" / "metrics.jsonl"
    path.unlink()
    os.mkfifo(path)
    assert collect.main(["--root", str(folder)]) == 2
    assert "a named pipe, not a regular file" in capsys.readouterr().err


@pytest.mark.parametrize("room", ["", "word_ptb", "trellisnet/training", "results/one"])
def test_every_page_quotes_the_output_of_a_run(root, capsys, room):
    folder = root()
    page = folder / room / "README.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    begin, end = "<!-- output of one: begin -->", "<!-- output of one: end -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    assert collect.main(["--root", str(folder)]) == 0
    assert capsys.readouterr().out == f"written: RESULTS.md, {page.relative_to(folder)}\n"
    text = page.read_text()
    assert "\nepoch   2  lr 20  train ppl 150.00  valid ppl 125.00 *  1m40s  50 tok/s\nvalid ppl 121.51  loss" in text
    assert "\ntest ppl 109.95  loss 4.7000 nats  81,720 tokens\n```\n" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_the_committed_pages_are_up_to_date(tmp_path):
    for path in {path for pattern in ("results/**/*", "RESULTS.md", *PAGES) for path in committed(pattern)}:
        copy = tmp_path / path.relative_to(PROJECT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path)
    assert collect.main(["--check", "--root", str(tmp_path)]) == 0


def test_a_block_that_results_quotes_may_stand_on_any_page(root):
    folder = root()
    (folder / "word_ptb").mkdir()
    block = "<!-- not comparable: begin -->\n- sizes\n<!-- not comparable: end -->\n"
    (folder / "word_ptb" / "README.md").write_text(f"before\n{block}after\n")
    assert collect.main(["--root", str(folder)]) == 0
    assert "\n## What is not comparable in the published tables\n\n- sizes\n" in (folder / "RESULTS.md").read_text()


@pytest.mark.parametrize("weights", ["results/zero/weights.pkl", "results/zero/weights.safetensors", "results/zero"])
def test_shipped_models(root, weights):
    folder = root(load_weight=weights)
    (folder / "README.md").write_text("a\n<!-- shipped: begin -->\n<!-- shipped: end -->\nb\n")
    exported = EXPORTED
    path = folder / "results" / "one" / "weights.json"
    path.write_text(json.dumps(exported))
    assert collect.main(["--root", str(folder)]) == 0
    row = "| [`one`](results/one) | word_ptb | 123,456 | 109.95 ppl | 56.97 | CPU, 2 cores | 60 after `zero` | 0.2 MB |"
    assert f"|--:|\n{row}\n<!-- shipped: end -->\nb\n" in (folder / "README.md").read_text()
    page = (folder / "results" / "one" / "README.md").read_text()
    for part in (
        "| perplexity | 121.51 | 109.95 | 56.97 (24M parameters, preset `paper`) |",
        'load_pretrained("one")', "python word_ptb/train.py --run results/one --eval\n", f"\n{METRICS['command']}\n",
        "It continues [`zero`](../zero/README.md). Training took 60 minutes on CPU, 2 cores, commit `0123456789ab`.",
        "licensed by the Linguistic Data Consortium (LDC99T42). The data (SHA-256 `fff",
    ):  # fmt: skip
        assert part in page
    assert collect.main(["--check", "--root", str(folder)]) == 0
    (folder / "results" / "one" / "README.md").write_text(f"mine\n{page.replace('109.95', '99')}mine\n")
    assert collect.main(["--check", "--root", str(folder)]) == 1
    assert collect.main(["--root", str(folder)]) == 0
    assert (folder / "results" / "one" / "README.md").read_text() == f"mine\n{page}mine\n"
    path.write_text(json.dumps(exported | {"commit": "0123-dirty"}))
    assert collect.main(["--root", str(folder)]) == 2


def test_a_model_may_continue_a_run_in_its_default_folder(root):
    folder = root(load_weight="runs/word_ptb/zero/weights.pkl")
    (folder / "results" / "one" / "weights.json").write_text(json.dumps(EXPORTED))
    assert collect.main(["--root", str(folder)]) == 0
    page = (folder / "results" / "one" / "README.md").read_text()
    assert "It continues [`word_ptb_zero`](../word_ptb_zero/README.md)" in page


def test_flags_of_all_tasks(root):
    folder = root()
    (folder / "README.md").write_text("<!-- flags: begin -->\n<!-- flags: end -->\n")
    assert collect.main(["--root", str(folder)]) == 0
    text = (folder / "README.md").read_text()
    rows = [re.split(r" *\| *", line)[1:4] for line in text.splitlines() if line.startswith("| `")]
    defaults = {flag: default for flag, _, default in rows}
    assert defaults["`--seed`"] == "1111"
    assert defaults["`--nlevels`"] == "58 (word_ptb); 140 (char_ptb); 75 (wt103); 11 (images)"
    assert defaults["`--tied`, `--no-tied` (texts)"] == "on"
    assert defaults["`--epochs` †"].startswith("500 (word_ptb); ")
    assert next(meaning for flag, meaning, _ in rows if flag == "`--activation`").endswith(" (lstm, gru, tanh)")
    assert "--load`" not in text  # hidden


def write_long_memory(root, row, **changes):
    folder = root / "results" / "long_memory" / row
    folder.mkdir(parents=True)
    problem = row.partition("_")[0]
    score = {"accuracy": 0.5, "loss": 2e-5} if problem == "copy" else {"mse": 3e-5, "loss": 3e-5}
    own = {"task": "memory", "problem": problem, "length": 400, "chance": 0.05, "receptive_field": 452}
    own |= {"test": score | {"examples": 1000}, "corpus": "copy, T = 400"}
    (folder / "metrics.json").write_text(json.dumps(METRICS | own | changes))
    epoch = {"event": "epoch", "finished": True, "valid_score": 1.0, "train_score": 1.0, "seconds": 60}
    lines = [epoch | {"epoch": i, "valid_loss": 0.1**i} for i in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "log.txt").write_text("")


def test_problems_of_memory(root):
    folder = root()
    write_long_memory(folder, "adding_awd_lstm", receptive_field=None)
    write_long_memory(folder, "copy_trellisnet")
    assert collect.main(["--root", str(folder)]) == 0
    text = (folder / "RESULTS.md").read_text()
    rows = ["copy | 400 | TrellisNet | 123,456 | 452 | 2 | 60 | 2.0e-05 | 0.5000 | 5.0e-02 | `0123456789ab` |"]
    rows += ["adding | 400 | LSTM | 123,456 | all | 2 | 60 | 3.0e-05 |  | 5.0e-02 | `0123456789ab` |"]
    assert "\n".join(f"| {row}" for row in rows) in text


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ("copy_rhn", {"problem": "adding"}, "copy_rhn: a run of the problem adding"),
        ("copy_gru", {}, "copy_gru: expected a row of scripts/memory.sh, such as copy_trellisnet"),
        ("copy_rhn", {"seed": 2}, "long_memory: the runs differ in seed; keep those of one kind"),
    ],
)
def test_what_is_no_row_of_the_problems_of_memory_is_refused(root, capsys, row, changes, message):
    folder = root()
    write_long_memory(folder, "copy_trellisnet")
    write_long_memory(folder, row, **changes)
    assert collect.main(["--root", str(folder)]) == 2
    assert capsys.readouterr().err.endswith(f"{message}\n")


def test_bits_per_character_are_given_for_both_streams(root):
    split = {"loss": 0.9, "bpc": 1.29843, "bpc_authors": 1.29843, "bpc_standard": 1.32051, "tokens": 449930}
    folder = root(task="char_ptb", valid=split, test=split)
    assert collect.main(["--root", str(folder)]) == 0
    text = (folder / "RESULTS.md").read_text()
    assert "bits per character **1.2984**, 1.3205 on the standard stream (449,930 tokens scored)" in text
    assert "the paper reports 1.158" in text
    assert "| train bpc | valid bpc |" in text


def test_memory_is_written_into_readme(root):
    folder = root()
    (folder / "results" / "memory").mkdir()
    command = "python word_ptb/train.py --preset paper --accumulate 4 --max_steps 1 --max_eval_tokens 100 --metrics m"
    measured = METRICS | {"command": command, "peak_memory": 5_678_000_000}
    (folder / "results" / "memory" / "word_ptb.json").write_text(json.dumps(measured))
    (folder / "README.md").write_text("a\n<!-- memory: begin -->\n<!-- memory: end -->\nb\n")
    assert collect.main(["--root", str(folder)]) == 0
    row = "| `python word_ptb/train.py --preset paper --accumulate 4` | 123,456 | 5.7 GB |"
    assert f"|--:|\n{row}\n<!-- memory: end -->\nb\n" in (folder / "README.md").read_text()
    for change in ({"corpus": "synthetic"}, {"commit": "0123-dirty"}, {"peak_memory": None}):
        (folder / "results" / "memory" / "word_ptb.json").write_text(json.dumps(measured | change))
        assert collect.main(["--root", str(folder)]) == 2


def test_speed_is_written_into_readme(root):
    folder = root()
    (folder / "results" / "speed").mkdir()
    timed = {"task": "word_ptb", "part": "step", "share_of_peak": 0.5, "gflops": 100.0}
    records = [
        timed | {"variant": "reference", "seconds": 40.0, "ratio": 1.0},
        timed | {"variant": "fused", "seconds": 20.0, "ratio": 2.0},
        {"task": "word_ptb", "part": "generation", "variant": "fused", "per_second": 9.0, "ratio": 20.0},
        {"task": "word_ptb", "part": "memory", "variant": "reference", "bytes": 8e9},
        {"task": "word_ptb", "part": "memory", "variant": "fused", "bytes": 4e9},
    ]
    head = {"command": "python scripts/bench.py", "machine": "M", "threads": 2, "torch": "2", "commit": "0123"}
    path = folder / "results" / "speed" / "cpu.json"
    path.write_text(json.dumps({**head, "records": records}))
    (folder / "README.md").write_text("a\n<!-- speed: begin -->\n<!-- speed: end -->\nb\n")
    assert collect.main(["--root", str(folder)]) == 0
    text = (folder / "README.md").read_text()
    assert "| task | | reference | fused |" in text
    assert "| word_ptb | step | 40 s (50%) | 20 s, **2.00x** (50%) |" in text
    assert "| word_ptb | generation |  | 9 tokens/s |" in text
    assert "| word_ptb | memory | 8.00 GB | 4.00 GB, 1/2.0 |" in text
    assert "`python scripts/bench.py` on M, 2 threads, torch 2, commit `0123`" in text
    for bad in ({**head, "commit": "0-dirty", "records": records}, {**head, "records": [{}]}):
        path.write_text(json.dumps(bad))
        assert collect.main(["--root", str(folder)]) == 2


def test_accuracies_and_the_order_of_pixels(root):
    split = {"loss": 0.1, "accuracy": 0.98765, "examples": 10_000}
    folder = root(task="pmnist", valid=split, test=split, permute=False)
    assert collect.main(["--root", str(folder)]) == 0
    text = (folder / "RESULTS.md").read_text()
    assert "## pmnist, preset `small`, not permuted" in text
    assert "accuracy **0.9877** (10,000 examples scored); the paper reports 98.13 %, 99.20 % without" in text


def test_a_run_that_recites_is_reported_by_its_accuracy(root):
    scores = {"loss": 6.8, "tokens": 73044, "accuracy": 0.2, "ppl": 900.0}
    folder = root(valid=scores, test=scores)
    assert collect.main(["--root", str(folder)]) == 0
    text = (folder / "RESULTS.md").read_text()
    assert "- Test: accuracy **0.2000** (73,044 tokens scored); " in text
    assert "| epoch | lr | train accuracy | valid accuracy | minutes |" in text
    assert "900" not in text
    assert "| 1 | word_ptb |" not in text  # the paper has no such run


def test_the_weights_that_a_run_started_from_are_named(root):
    folder = root(load_weight="results/a/weights.pkl")
    assert collect.main(["--root", str(folder)]) == 0
    assert "## word_ptb, preset `small`, from `results/a/weights.pkl`\n" in (folder / "RESULTS.md").read_text()


def test_a_table_of_the_paper_beside_our_runs(root, capsys):
    folder = root()

    def finish(row, seed, **changes):
        path = folder / "runs" / "tables" / "table1" / row / f"seed-{seed}"
        path.mkdir(parents=True)
        (path / "metrics.json").write_text(json.dumps(METRICS | changes))

    finish("trellisnet", 1, test={"loss": 4.0, "ppl": 57.0, "tokens": 1})
    finish("trellisnet", 2, test={"loss": 4.0, "ppl": 58.0, "tokens": 1})
    finish("trellisnet", 3, complete=False)
    finish("trellisnet_mos", 1, corpus="synthetic")
    assert collect.main(["--root", str(folder), "--table", "1"]) == 0
    out = capsys.readouterr().out
    assert "| TrellisNet | 24M | 56.97 | 57.50 ± 0.71 (n = 2, 2 epochs) | 123,456 |" in out
    assert "| TrellisNet-MoS | 25M | 54.67 | not run |  |" in out
    assert not (folder / "RESULTS.md").exists()
    last = folder / "runs" / "tables" / "table1" / "trellisnet" / "seed-1" / "metrics.json"
    changed = [{"params": 7}, {"epochs": 1}, {"data": "0"}, {"commit": "0123-dirty"}]
    for bad in ("{", *(json.dumps(METRICS | change) for change in changed)):
        last.write_text(bad)
        assert collect.main(["--root", str(folder), "--table", "1"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    last.write_text(json.dumps(METRICS))
    for seed, epochs in ((1, 31), (2, 17), (3, 23)):  # each ends on its own plateau
        finish("awd_lstm_finetuned", seed, preset="awd-lstm-finetune", epochs=epochs)
    assert collect.main(["--root", str(folder), "--table", "1"]) == 0
    assert " ± 0.00 (n = 3, 17 to 31 epochs) | 123,456 |" in capsys.readouterr().out


def test_a_run_without_validation_is_collected(root):
    folder = root(valid=None)
    records = (folder / "results" / "one" / "metrics.jsonl").read_text()
    records = re.sub(r'"valid_score": [\d.]+', '"valid_score": null', records)
    (folder / "results" / "one" / "metrics.jsonl").write_text(records)
    assert collect.main(["--root", str(folder)]) == 0
    text = (folder / "RESULTS.md").read_text()
    assert "- Validation: none held out; the last epoch is scored" in text
    assert "| 2 | 20 | 150.00 |  | 2.0 |" in text


def test_rows_are_compared_at_equal_updates(root, capsys):
    folder = root()
    rows = folder / "results" / "table6_small"
    rows.mkdir()
    command = (
        "python word_ptb/train.py --preset small --aux 0.05 --seed 1 --max_steps 7 --overwrite --out /x --metrics /y"
    )

    def write(row, ppl, command=command, **changes):
        test = {"loss": 4.0, "ppl": ppl, "tokens": 5}
        metrics = METRICS | {"command": command, "steps": 7, "complete": False, "valid": test, "test": test} | changes
        (rows / f"{row}.json").write_text(json.dumps(metrics))

    write("trellisnet", 300.0)
    write("inject_every_2", 310.5, command.replace(" --seed", " --inject_every 2 --seed"), params=99)
    assert collect.main(["--root", str(folder)]) == 0
    text = (folder / "RESULTS.md").read_text()
    assert "## Rows of Table 6, word_ptb, preset `small`, 7 updates each" in text
    assert "`python word_ptb/train.py --preset small --aux 0.05 --seed 1 --max_steps 7`" in text
    assert "| TrellisNet |  | 123,456 | 60.0 | 300.00 | 300.00 |  |  |" in text
    flags = "| `--inject_every 2` | 99 | 60.0 | 310.50 | 310.50 | +10.50 | +0.47 |"
    assert f"| - Injected Input (every 2 layers instead) {flags}" in text
    partial = {"loss": 4.0, "ppl": 1.0, "tokens": 5, "partial": True}
    for change, message in [
        ({"commit": "0-dirty"}, "the code was not committed"),
        ({"corpus": "synthetic"}, "a run on synthetic data is no result"),
        ({"preset": "tiny"}, "of another preset than small"),
        ({"test": partial}, "its scores are partial"),
        ({"valid": None}, "corrupt"),
    ]:
        for row in ("trellisnet", "inject_every_2"):
            write(row, 310.5, **change)
        assert collect.main(["--root", str(folder)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    write("trellisnet", 300.0)
    write("inject_every_2", 310.5, steps=8)
    assert collect.main(["--root", str(folder)]) == 2
    assert "the runs differ in steps; keep those of one kind" in capsys.readouterr().err
    write("inject_every_2", 310.5)
    (rows / "inject_every_2.json").rename(rows / "nothing.json")
    assert collect.main(["--root", str(folder)]) == 2
    assert "no row of Table 6" in capsys.readouterr().err
    rows.rename(rows.with_name("table9_small"))
    assert collect.main(["--root", str(folder)]) == 2
    assert "expected a name such as table6_small" in capsys.readouterr().err


def test_tables_of_other_papers(root, capsys):
    folder = root()
    path = folder / "runs" / "tables" / "sparse_table" / "recite_dense" / "seed-0"
    path.mkdir(parents=True)
    (path / "metrics.json").write_text(json.dumps(METRICS | {"test": {"accuracy": 0.2, "ppl": 900.0, "loss": 6.8}}))
    (path / "metrics.jsonl").write_text(json.dumps({"event": "epoch", "train_score": 0.9876}) + "\n")
    assert collect.main(["--root", str(folder), "--table", "sparse"]) == 0
    printed = capsys.readouterr().out
    assert "| Reciting: dense | 24.2M |  | 98.76 (n = 1, 2 epochs) | 123,456 |" in printed
    assert "| AWD-LSTM | 24.2M |  | not run |  |" in printed
    assert collect.main(["--root", str(folder), "--table", "rhn"]) == 0
    assert "| depth 10, untied weights | 32M | 68.3 | not run |  |" in capsys.readouterr().out
    assert collect.main(["--root", str(folder), "--table", "compare"]) == 0
    assert "nothing has been compared yet" in capsys.readouterr().out


def test_rows_of_other_tables_are_in_their_script():
    script = (PROJECT / "scripts" / "sparse_table.sh").read_text()
    listed = script.rsplit("\nrows ", 1)[1].split()
    assert listed == [row.name for row in TABLES["sparse"].rows]
    script = (PROJECT / "scripts" / "compare.sh").read_text()
    assert list(COMPARED) == script.split("\nrows ", 1)[1].splitlines()[0].split()


FAULTS = {
    "command": "python scripts/torture.py --soak 9 --json x.json", "seed": 1, "commit": "0123456789ab", "machine": "M",
    "torch": "2", "clocks": {"runs": 1}, "locks": {"refused": 2},
    "kills": {"killed in step": 40, "killed in evaluation": 30, "killed in checkpoint": 20, "terminated": 10,
              "seconds to terminate": 0.5, "runs": 1, "epochs": 12},
    "disk": {"too large": 1, "no room": 150, "read-only": 2},
    "payloads": {"files": 231, "opened": 889, "executed": 0, "bytes": 7.3e7},
    "soak": {"minutes": 9.0, "resident at the start": 3e8, "resident at the end": 3.01e8, "epochs": 5, "steps": 6789},
    "mutations": [
        {"target": "weights", "tried": 1200, "summed": True, "detected": 900, "harmless": 300, "unnoticed": 0},
        {"target": "old", "tried": 9, "summed": False, "detected": 4, "harmless": 3, "unnoticed": 2},
    ],
}  # fmt: skip


def test_findings_of_torture(root):
    folder = root()
    path = folder / "results" / "torture" / "full.json"
    path.parent.mkdir()
    path.write_text(json.dumps(FAULTS))
    assert collect.main(["--root", str(folder)]) == 0
    text = (folder / "RESULTS.md").read_text()
    for part in (
        "`python scripts/torture.py --soak 9` on M, torch 2, commit `0123456789ab`, seed 1.",
        "- Kills survived: 90 (40 in step, 30 in evaluation, 20 in checkpoint) in 1 run(s) of 12 epochs; and 10 times",
        "- Writes that failed: 150 for lack of space, 1 for a limit on file size; read-only folders: ",
        "231, opened 889 times; 0 ran code, and memory grew by 73 MB",
        "in 9 minutes of training (6,789 updates, 5 epochs, each evaluated and saved) from 300.0 to 301.0 MB",
        "| weights | 1,200 | 900 | 300 | 0 |",
        "| old, which has no checksums | 9 | 4 | 3 | 2 |",
    ):
        assert part in text
    path.write_text(json.dumps({key: value for key, value in FAULTS.items() if key != "soak"}))
    assert collect.main(["--root", str(folder)]) == 0
    assert "Memory:" not in (folder / "RESULTS.md").read_text()
    for change in (
        {"commit": "0-dirty"},
        {"commit": None},
        {"soak": {"epochs": 1}},
        {"mutations": [{}]},
        {"kills": {}},
    ):
        path.write_text(json.dumps(FAULTS | change))
        assert collect.main(["--root", str(folder)]) == 2


def test_ranks_are_compared(root):
    folder = root()
    path = folder / "results" / "torture" / "ranks.json"
    path.parent.mkdir()
    small = {"losses": 1e-8, "gradients": 2e-7, "weights": 0.0, "scores": 0.0}
    records = [
        {"task": "wt103", "ranks": 2, "dtype": "float32", **small},
        {"task": "wt103", "ranks": 2, "dtype": "float64", **small, "gradients": 3e-15, "losses": 0.0},
    ]
    head = {"command": "python scripts/compare_ranks.py --json x", "commit": "0123", "machine": "M", "torch": "2"}
    found = {**head, "steps": 5, "records": records}
    path.write_text(json.dumps(found))
    assert collect.main(["--root", str(folder)]) == 0
    text = (folder / "RESULTS.md").read_text()
    assert "`python scripts/compare_ranks.py` on M, torch 2, commit `0123`: tiny networks" in text
    assert "| wt103 | 2 | 2.0e-07 | 3.0e-15 |" in text
    for change in ({"commit": "0-dirty"}, {"records": records[:1]}, {"records": None}):
        path.write_text(json.dumps(found | change))
        assert collect.main(["--root", str(folder)]) == 2


@pytest.mark.parametrize("number", [name for name in TABLES if name.isdigit()])
def test_every_row_of_a_table_is_in_its_script(number):
    script = (PROJECT / "scripts" / f"table{number}.sh").read_text()
    functions = set(re.findall(r"^(\w+)\(\) \{ (?:FROM=\w+ )?train ", script, re.M))
    listed = set(re.sub(r"\\\n", " ", script).rsplit("\nrows ", 1)[1].split())
    assert functions == listed == {row.name for row in TABLES[number].rows}


def test_parts_of_the_recipe_are_compared(root):
    folder = root()
    (folder / "results" / "recipe").mkdir()

    def write(row, accuracy, flags, **more):
        command = f"python pmnist/train.py --preset best --epochs 2 {flags} --seed 1111 --threads 1 --out runs/x"
        split = {"loss": 0.5, "accuracy": accuracy, "examples": 100}
        metrics = METRICS | {"task": "pmnist", "preset": "best", "command": command, "permute": True, "epochs": 2}
        metrics |= {"valid": split, "test": split} | more
        (folder / "results" / "recipe" / f"{row}.json").write_text(json.dumps(metrics))

    write("ema", 0.935, "--label_smoothing 0")
    write("gain", 0.91, "--schedule step --label_smoothing 0 --ema 0")
    assert collect.main(["--root", str(folder)]) == 0
    text = (folder / "RESULTS.md").read_text()
    assert "`python pmnist/train.py --preset best --label_smoothing 0 --epochs 2` and the flags" in text
    rows = [line for line in text.splitlines() if line.startswith("| + ")]
    assert rows[0].startswith("| + `--init_gain` | `--schedule step --ema 0` | 0.9100 |  |")
    assert rows[1].startswith("| + averaged weights |  | 0.9350 | +0.0250 |")
    write("gain", 0.91, "--ema 0", machine="another")
    assert collect.main(["--root", str(folder)]) == 2
    (folder / "results" / "recipe" / "gain.json").rename(folder / "results" / "recipe" / "other.json")
    assert collect.main(["--root", str(folder)]) == 2


def test_short_runs_are_listed_in_their_order(root, capsys):
    folder = root()
    short = folder / "results" / "short_runs"
    short.mkdir()
    for i, (flags, epoch) in enumerate([("", 1), (" --finetune --load_weight runs/a", 0)]):
        command = f"python word_ptb/train.py --model rhn{flags} --threads 1 --out runs/x --metrics runs/x/m.json"
        metrics = METRICS | {"command": command, "best_epoch": epoch}
        (short / f"{i}_run.json").write_text(json.dumps(metrics))
    assert collect.main(["--root", str(folder)]) == 0
    text = (folder / "RESULTS.md").read_text()
    first, second = re.findall(r"^\| `python word_ptb/train.py --model rhn.*", text, re.M)
    assert first.startswith("| `python word_ptb/train.py --model rhn --out runs/x` | Penn Treebank |")
    assert "| 121.51 |" in first
    assert "--finetune --load_weight runs/a --out runs/x` | Penn Treebank |" in second
    assert "| 121.51, as loaded |" in second
    (short / "0_run.json").write_text(json.dumps(METRICS | {"command": "python x.py --load_weight /home/me/w.pkl"}))
    assert collect.main(["--root", str(folder)]) == 2
    assert "0_run.json: the command names a path of one machine" in capsys.readouterr().err
    for path in short.iterdir():
        path.unlink()
    assert collect.main(["--root", str(folder)]) == 2
    assert "short_runs: has no runs" in capsys.readouterr().err


def test_precisions_are_compared(root):
    folder = root()
    (folder / "results" / "precision").mkdir()
    split = {"loss": 5.0, "ppl": 148.413, "tokens": 100}
    for kind, seed, ppl in (("fp32", 2, 148.5), ("bf16", 2, 148.25), ("fp32", 1, 149.0)):
        command = f"python word_ptb/train.py --preset small --epochs 2 --precision {kind} --seed {seed} --out runs/x"
        metrics = METRICS | {"command": command, "precision": kind, "seed": seed, "backend": "fused"}
        metrics |= {"valid": split | {"ppl": ppl}, "test": split}
        (folder / "results" / "precision" / f"{kind}-{seed}.json").write_text(json.dumps(metrics))
    assert collect.main(["--root", str(folder)]) == 0
    text = (folder / "RESULTS.md").read_text()
    assert (
        "`python word_ptb/train.py --preset small --epochs 2 --precision … --seed …`: `bash scripts/precision" in text
    )
    scores = {"fp32 | 2": 148.5, "fp32 | 1": 149.0, "bf16 | 2": 148.25}
    rows = [f"| {kind} | 60.0 | {ppl:.2f} | 148.41 |" for kind, ppl in scores.items()]
    assert "\n".join(rows) in text
    for change in ({"corpus": "synthetic"}, {"steps": 7}, {"complete": False}):
        path = folder / "results" / "precision" / "bf16-2.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        assert collect.main(["--root", str(folder)]) == 2


def test_cache_and_dynamic_evaluation(root, capsys):
    folder = root()
    path = folder / "results" / "adapted" / "word_ptb_small.json"
    path.parent.mkdir()
    result = {"loss": 4.6, "tokens": 82_429, "seconds": 90.0, "peak_memory": 512_000_000}
    command = "python word_ptb/train.py --preset small --eval --cache 500 1 0.1 --dynamic_eval"
    ways = {"static": 101.5, "cache": 92.25, "dynamic": 90.125, "dynamic_cache": 88.0}
    metrics = METRICS | {"command": f"{command} --metrics runs/m.json"}
    for split in ("valid", "test"):
        metrics |= {f"{split}_{way}": result | {"ppl": ppl + (split == "valid")} for way, ppl in ways.items()}
    for split in ("valid", "test"):
        metrics[f"{split}_dynamic"] |= {"settings": {"rule": "rms", "lr": 0.0001}, "seconds": 600.0}
        metrics[f"{split}_dynamic_cache"]["peak_memory"] = None
    metrics["valid_dynamic"]["preparation_seconds"] = 120.0
    path.write_text(json.dumps(metrics))
    assert collect.main(["--root", str(folder)]) == 0
    text = (folder / "RESULTS.md").read_text()
    for part in (
        f"## Cache and dynamic evaluation, `word_ptb_small`\n\n`{command}` on CPU, 2 cores, 2 threads",
        "| static | 102.50 | 101.50 | 1.5 | 0.51 GB |  |  |",
        "| + cache | 93.25 | 92.25 | 1.5 | 0.51 GB |  |  |",
        "| + dynamic evaluation | 91.12 | 90.12 | 10.0 | 0.51 GB | 2.0 min | rule rms, lr 0.0001 |",
        "| + dynamic evaluation + cache | 89.00 | 88.00 | 1.5 |  |  |  |",
    ):
        assert part in text
    for change, message in [
        ({"corpus": "synthetic"}, "a run on synthetic data is no result"),
        ({"commit": "0-dirty"}, "the code was not committed"),
        ({"complete": False}, "not a complete run"),
        ({"command": "python word_ptb/train.py --load_weight /tmp/w.pkl"}, "names a path of one machine"),
        ({"test_static": {}}, "it has no 'score'"),
        (
            {"test_cache": metrics["test_cache"] | {"tokens": 9}},
            "the ways are scored on different parts of the test data",
        ),
        ({"test_cache": 7}, "corrupt"),
    ]:
        path.write_text(json.dumps(metrics | change))
        assert collect.main(["--root", str(folder)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_growing_and_random_depth(root, capsys):
    folder = root()
    (folder / "results" / "growth").mkdir()
    fixed = METRICS | {"epochs": 3, "grow": [], "random_depth": 0}
    plans = {"fixed": fixed, "grown": fixed | {"epochs": 4, "grow": ["2:2"], "steps": 30, "commit": "cdef01234567"}}
    plans["windows"] = fixed | {"command": fixed["command"] + " --horizon 8 --batch_size 38", "steps": 31}
    runs = {"word_fixed-1": 120.0, "word_grown-1": 110.0, "word_grown-2": 112.0, "word_depth_2-1": 150.0}
    for name, ppl in (runs | {"word_windows-1": 115.0}).items():
        metrics = plans.get(name[5:-2], fixed) | {"seed": int(name[-1])}
        metrics["test"] = METRICS["test"] | {"ppl": ppl}
        (folder / "results" / "growth" / f"{name}.json").write_text(json.dumps(metrics))
    depths = {f"test_depth_{layers}": {"ppl": 153.0} for layers in (2, 4, 6)}
    path = folder / "results" / "growth" / "word_random-1.json"
    drawn = fixed | {"random_depth": 2, "seed": 1, "test": METRICS["test"] | {"ppl": 126.0}}
    path.write_text(json.dumps(drawn | depths))
    assert collect.main(["--root", str(folder)]) == 0
    rows = (folder / "RESULTS.md").read_text().splitlines()
    assert "| word | 3 epochs of 8 layers | 7.08M | 1 | 121.51 | 120.00 | 60 |" in rows
    assert "| word | 3 epochs of 8 layers, in windows of 8 tokens | 7.08M | 1 | 121.51 | 115.00 | 60 |" in rows
    spread = "121.51 ± 0.00 | 111.00 ± 1.41"
    assert f"| word | 2 epochs of 2 layers, 2 epochs of 8 layers | 6.98M | 2 | {spread} | 60 |" in rows
    assert "| word | 2 | 1 | 150.00 | 153.00 | +2.0% |" in rows
    assert "| word | 8 | 1 | 120.00 | 126.00 | +5.0% |" in rows
    assert "torch 2.13.0, commits `0123456789ab`, `cdef01234567`, Penn Treebank;" in "\n".join(rows)
    for name, content, message in (
        ("word_random-1", drawn, "it has no 'test_depth_2'"),
        ("word_random-1", drawn | depths | {"params": 7}, "the runs differ in params"),
        ("word_random-1", drawn | depths | {"steps": 7}, "the runs differ in steps"),
        ("word_random-1", drawn | depths | {"machine": "M"}, "the runs differ in machine"),
        ("words-1", METRICS, "expected the name of a row of scripts/depth.sh and a seed, as word_grown-1.json"),
        ("word_random-1", fixed | depths, "has random_depth 0, the row of scripts/depth.sh has 2"),
        ("word_grown-1", fixed, "has epochs 3, the row of scripts/depth.sh has 4"),
        ("word_windows-1", fixed, "its windows are not those of the row of scripts/depth.sh"),
    ):
        path = folder / "results" / "growth" / f"{name}.json"
        before = path.read_text() if path.exists() else None
        path.write_text(json.dumps(content))
        assert collect.main(["--root", str(folder)]) == 2
        assert message in capsys.readouterr().err
        path.unlink() if before is None else path.write_text(before)


def write_equilibrium(root):
    """Write records of all rows of scripts/equilibrium.sh, and return their folder."""
    folder, memory = root / "results" / "equilibrium", root / "results" / "memory"
    folder.mkdir()
    memory.mkdir()
    solved = {"residual": 7.5e-4, "evaluations": 9.25, "unsolved": 0.0125}
    trained = {f"train_{name}": value for name, value in solved.items()}

    def write(name, ppl, more=(), **changes):
        split = {"loss": 4.6, "ppl": ppl, "tokens": 9, **dict(more)}
        metrics = METRICS | {"seed": 1, "schedule": "cosine", "test": split, "valid": split} | changes
        (folder / f"{name}.json").write_text(json.dumps(metrics))

    def write_epoch(name, steps, seconds, **more):
        record = {"event": "epoch", "step": steps, "train_seconds": seconds, "train_score": 88.0, **more}
        (folder / f"{name}.jsonl").write_text(json.dumps({"event": "train"}) + "\n" + json.dumps(record) + "\n")

    for number, pair in enumerate(WEIGHTS.values()):
        for more, row in zip(((), solved), pair, strict=True):
            write(row, 100.0 - number - bool(more) / 2, more)
    write_epoch("unrolled", 3000, 1500.0)
    write_epoch("equilibrium", 3000, 4500.0, **trained)
    for seed, seconds in enumerate((20.0, 25.0, 90.0), start=1):
        write(f"timed_unrolled-{seed}", 150.0, complete=False)
        write(f"timed_equilibrium-{seed}", 150.0, complete=False)
        write_epoch(f"timed_unrolled-{seed}", 50, seconds)
        write_epoch(f"timed_equilibrium-{seed}", 50, 2 * seconds, **trained)
    measured = {"complete": False, "params": 12_345_678}
    for way, peak in (("unrolled", 4e9), ("recompute", 2e9), ("equilibrium", 1e9)):
        (memory / f"paper_{way}.json").write_text(json.dumps(METRICS | measured | {"peak_memory": peak}))
    return folder


def test_training_at_the_equilibrium(root):
    path = root()
    start = write_equilibrium(path) / "start_solved.json"
    start.write_text(json.dumps(json.loads(start.read_text()) | {"commit": "cafe"}))
    (path / "README.md").write_text("<!-- equilibrium: begin -->\n<!-- equilibrium: end -->\n")
    assert collect.main(["--root", str(path)]) == 0
    text = (path / "RESULTS.md").read_text()
    assert ", torch 2.13.0, commits `0123456789ab`, `cafe`, Penn Treebank, one seed (1)." in text
    rows = text.splitlines()
    for row in (
        "| as shipped | 16 layers | 100.00 | 100.00 |  |  |  |",
        "| as shipped | equilibrium | 99.50 | 99.50 | 7.5e-04 | 9.2 | 1.25% |",
        "| 16 layers | equilibrium | 98.50 | 98.50 | 7.5e-04 | 9.2 | 1.25% |",
        "| equilibrium | 16 layers | 98.00 | 98.00 |  |  |  |",
        "| unrolled | 3,000 | 88.00 |  |  |  | 0.500 | 4.00 GB |",
        "| equilibrium | 3,000 | 88.00 | 7.5e-04 | 9.2 | 1.25% | 1.000 | 1.00 GB |",
        "| unrolled, `--recompute` |  |  |  |  |  |  | 2.00 GB |",
        "| here: Penn Treebank, 0.1M, memory of 12M | 99.00 | 97.50 | 4.00 GB, with `--recompute` 2.00 GB | 1.00 GB | "
        "2.00, against 16 layers |",
    ):
        assert row in rows
    block = (path / "README.md").read_text().splitlines()
    assert "| test perplexity, 0.1M parameters, 16 layers | 99.00 | 97.50 | -1.5 % |" in block
    assert "| seconds per update of this model | 0.50 | 1.00 | +100.0 % |" in block
    assert "| training memory, 12M parameters, 55 layers | 4.00 GB | 1.00 GB | -75.0 % |" in block


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("equilibrium/unrolled", {"steps": 7}, "equilibrium: the runs differ in steps"),
        ("equilibrium/start_solved", {"params": 7}, "equilibrium: the runs differ in params"),
        ("equilibrium/timed_unrolled-2", {"machine": "another"}, "equilibrium: the runs differ in machine"),
        ("equilibrium/unrolled_solved", {"test": {"loss": 4.6, "ppl": 99.0}}, "it has no 'residual'"),
        ("equilibrium/equilibrium", {"complete": False}, "equilibrium.json: not a complete run"),
        ("memory/paper_recompute", {"threads": 1}, "memory: the runs differ in threads"),
    ],
)
def test_what_does_not_compare_with_an_equilibrium_is_refused(root, capsys, name, change, message):
    path = root()
    write_equilibrium(path)
    file = path / "results" / f"{name}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert collect.main(["--root", str(path)]) == 2
    assert message in (error := capsys.readouterr().err)
    assert error.count("\n") == 1


def test_tagging_names_its_text(root, capsys):
    path = root()
    folder = path / "results" / "pos_table"
    folder.mkdir()
    text = next(iter(TAGGED))

    def write(row, accuracy, **changes):
        split = {"loss": 0.5, "accuracy": accuracy, "tokens": 2_500}
        metrics = METRICS | {"task": "pos_tagging", "corpus": "tagged sentences", "data": text} | changes
        (folder / f"{row}.json").write_text(json.dumps(metrics | {"valid": split, "test": split}))

    write("sparse", 0.8125, params=7)
    write("dense", 0.75)
    assert collect.main(["--root", str(path)]) == 0
    report = (path / "RESULTS.md").read_text()
    assert f"`bash scripts/pos_table.sh` on {TAGGED[text]}: 5,000 training tokens, 2,500 test tokens" in report
    dense = "| LSTM, embedding of width 5 | 123,456 | 60 | 75.00 % | 75.00 % | `0123456789ab` |"
    sparse = "| LSTM, sparse embedding of width 20 | 7 | 60 | 81.25 % | 81.25 % | `0123456789ab` |"
    assert f"{dense}\n{sparse}\n" in report
    for row, change, message in (
        ("sparse", {"data": "0" * 64}, "pos_table: sparse is of a text that TAGGED in scripts/reports/tables.py"),
        ("sparse", {"seed": 7}, "pos_table: the runs differ in seed"),
        ("crf", {}, "pos_table: crf is no row of scripts/pos_table.sh: dense, sparse, "),
    ):
        write(row, 0.8, **change)
        assert collect.main(["--root", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_scores_by_depth_and_with_early_exit(root, capsys):
    folder = root()
    (folder / "results" / "depth").mkdir()
    path = folder / "results" / "depth" / "words.json"
    command = "python word_ptb/train.py --run results/words --eval --eval_depths 4 16"
    metrics = METRICS | {"command": f"{command} --threads 1 --metrics m.json"}
    for key, layers, ppl in (("", 8, 100.0), ("_depth_4", 4, 110.0), ("_depth_16", 16, 99.0)):
        result = {"loss": 4.6, "tokens": 9, "nlevels": layers, "receptive_field": layers + 1}
        metrics |= {f"valid{key}": result | {"ppl": ppl + 1}, f"test{key}": result | {"ppl": ppl}}
    path.write_text(json.dumps(metrics))
    assert collect.main(["--root", str(folder)]) == 0
    text = (folder / "RESULTS.md").read_text()
    rows = text[text.index("## Depth of scoring") :].splitlines()
    assert "| `words` | 4 | 5 | 111.00 | 110.00 | perplexity | 9 |  |" in rows
    assert "| `words` | 8 | 9 | 101.00 | 100.00 | perplexity | 9 | as trained |" in rows
    assert "| `words` | 16 | 17 | 100.00 | 99.00 | perplexity | 9 | chosen |" in rows
    assert f"- `words`: `{command}`; CPU, 2 cores, fp32, torch 2.13.0, commit `0123456789ab`" in rows

    shipped = folder / "results" / "words"
    shipped.mkdir()
    (shipped / "config.json").write_text('{"settings": {"nlevels": 4}}')  # the scores are those of another depth
    assert collect.main(["--root", str(folder)]) == 0
    rows = (folder / "RESULTS.md").read_text().splitlines()
    assert "| `words` | 4 | 5 | 111.00 | 110.00 | perplexity | 9 | as trained |" in rows
    assert "| `words` | 8 | 9 | 101.00 | 100.00 | perplexity | 9 |  |" in rows
    (shipped / "config.json").unlink()
    shipped.rmdir()
    capsys.readouterr()

    (folder / "results" / "exit").mkdir()
    exits = METRICS | {"command": "python word_ptb/train.py --eval --early_exit 0.1", "complete": False}
    for share, layers, seconds in ((0.1, 5.25, 60.0), (0.0, 16.0, 120.0)):
        result = {"loss": 4.6, "tokens": 1234, "ppl": 101.0 + share, "partial": True}
        exits[f"test_exit_{share:g}"] = result | {"tolerance": share, "layers": layers, "seconds": seconds}
    other = folder / "results" / "exit" / "words.json"
    other.write_text(json.dumps(exits))
    assert collect.main(["--root", str(folder)]) == 0
    text = (folder / "RESULTS.md").read_text()
    assert "**Early exit**, `words` with 16 layers, read as streams: " in text
    assert "| all layers | 16.0 | 101.00 | 2.0 |  |\n| 0.1 | 5.2 | 101.10 | 1.0 | 50% |\n" in text
    for file, content, change, message in (
        (path, metrics, {"test": metrics["test"] | {"tokens": 8}}, "scored on different parts of the test data"),
        (path, METRICS, {}, "has no scores by depth; score the run with --eval_depths"),
        (path, metrics, {"test_depth_4": {}}, "it has no 'nlevels'"),
        (other, METRICS, {}, "has no scores by tolerance; score the run with --early_exit"),
    ):
        file.write_text(json.dumps(content | change))
        assert collect.main(["--root", str(folder)]) == 2
        assert message in (error := capsys.readouterr().err)
        assert error.count("\n") == 1
        file.write_text(json.dumps(metrics if file == path else exits))


def test_of_equal_accuracies_the_loss_chooses_the_depth(root):
    folder = root()
    (folder / "results" / "depth").mkdir()
    metrics = METRICS | {"task": "pmnist", "command": "python pmnist/train.py --run x --eval --eval_depths 4 16"}
    for key, layers, loss in (("", 8, 0.3), ("_depth_4", 4, 0.4), ("_depth_16", 16, 0.2)):
        result = {"loss": loss, "accuracy": 0.5, "examples": 9, "nlevels": layers, "receptive_field": layers + 1}
        metrics |= {f"valid{key}": result, f"test{key}": result}
    (folder / "results" / "depth" / "images.json").write_text(json.dumps(metrics))
    assert collect.main(["--root", str(folder)]) == 0
    rows = (folder / "RESULTS.md").read_text().splitlines()
    assert [row.split(" | ")[1] for row in rows if row.endswith("| chosen |")] == ["16"]


def test_a_card_names_the_order_of_the_pixels(root):
    split = {"loss": 0.1, "accuracy": 0.5, "examples": 10_000}
    for task, permute, order in (
        ("cifar10", False, "row by row"), ("pmnist", True, "in the order of `permutation` in [config.json](config"),
    ):  # fmt: skip
        folder = root(task=task, valid=split, test=split, permute=permute)
        exported = EXPORTED | {"task": task, "valid": split, "test": split}
        for name, content in (("weights", exported), ("config", {"pixels": 1024})):
            (folder / "results" / "one" / f"{name}.json").write_text(json.dumps(content))
        assert collect.main(["--root", str(folder)]) == 0
        assert f"\nPixels are read {order}" in (folder / "results" / "one" / "README.md").read_text()


def test_the_best_results_stand_beside_the_papers(root, capsys):
    folder = root()
    images = {"task": "pmnist", "test": {"loss": 0.1, "accuracy": 0.95, "examples": 5}, "valid": None}
    for name, changes in {
        "char": {"task": "char_ptb", "test": {"loss": 1.0, "bpc": 1.4, "tokens": 5}, "valid": None},
        "standard": {  # its score on the stream of the paper's counts
            "task": "char_ptb", "test": {"loss": 1.0, "bpc": 1.41, "bpc_authors": 1.39, "tokens": 5}, "valid": None,
        },
        "own": {"corpus": "own corpus", "test": METRICS["test"] | {"ppl": 9.0}},
        "sequential": images | {"permute": False},
        "permuted": images | {"permute": True, "augment": False},
        "varied": images | {"permute": True, "augment": True, "load_weight": "results/permuted"},
        "better": {
            "load_weight": "results/one/weights.pkl", "params": 7, "test": METRICS["test"] | {"ppl": 20.0},
        },
    }.items():  # fmt: skip
        write_run(folder / "results" / name, METRICS | changes)
    assert collect.main(["--root", str(folder)]) == 0
    text = (folder / "RESULTS.md").read_text()
    rows = text[text.index("| table |") : text.index("## word_ptb")].strip().splitlines()[2:]
    size = {task: published.setting for task, published in PUBLISHED.items()}
    after = "`small` | 123,456 | Penn Treebank | 60"
    assert rows == [
        f"| 1 | word_ptb | {size['word_ptb']} | 56.97 | 20.00 | `small` | 7 | Penn Treebank | 60 after `results/one` |",
        f"| 1 | word_ptb | {size['word_ptb']} | 56.97 | 9.00 | `small` | 123,456 | own corpus | 60 |",
        f"| 3 | char_ptb | {size['char_ptb']} | 1.158 | 1.3900 | {after} |",
        f"| 4 | pmnist, permuted | {size['pmnist']} | 98.13 % | 95.00 % | {after} |",
        f"| 4 | pmnist, permuted, augmented | {size['pmnist']} | 98.13 % | 95.00 % | "
        f"{after} after `results/permuted` |",
        f"| 4 | pmnist, not permuted | {size['pmnist']} | 99.20 % | 95.00 % | {after} |",
    ]
    assert "\n## pmnist, preset `small`, augmented, from `results/permuted`\n" in text
    assert text.count("\n## pmnist, preset `small`\n") == 1


def test_a_mistyped_flag_gets_a_suggestion(capsys):
    assert collect.main(["--nonsense"]) == 2
    assert capsys.readouterr().err == "error: unknown argument --nonsense; --help lists the flags\n"
    assert collect.main(["--chek"]) == 2
    assert capsys.readouterr().err == "error: unknown argument --chek; did you mean --check?\n"


def test_networks_are_compared_after_equal_time(root, capsys):
    folder = root()
    compare = folder / "results" / "compare_25_minutes"
    out = "/home/me/runs/tables/compare-25-minutes/x"
    metrics = METRICS | {"command": f"{METRICS['command']} --model rhn --threads 1 --out {out} --metrics /x.json"}
    for row, ppl in (("trellisnet", 140.0), ("rhn", 150.0)):
        write_run(compare / row, metrics | {"test": metrics["test"] | {"ppl": ppl}})
    assert collect.main(["--root", str(folder)]) == 0
    text = (folder / "RESULTS.md").read_text()
    assert "after about 25 minutes each, word_ptb" in text
    command = f"`{METRICS['command']} --model rhn`"
    row = f"| Recurrent highway network | 123,456 | fp32 | 2 | 60.0 | 50 | 121.51 | 150.00 | {command} |"
    assert text.index("| TrellisNet |") < text.index(row)
    other = metrics["command"].replace("25", "20")
    (compare / "rhn" / "metrics.json").write_text(json.dumps(metrics | {"command": other}))
    assert collect.main(["--root", str(folder)]) == 2
    assert (
        "rhn: was planned for another time (--out /home/me/runs/tables/compare-20-minutes/x)" in capsys.readouterr().err
    )
    write_run(compare / "rhn", metrics | {"threads": 1})
    assert collect.main(["--root", str(folder)]) == 2
    assert "the runs differ in threads; keep those of one kind" in capsys.readouterr().err
    (compare / "rhn").rename(compare / "other")
    assert collect.main(["--root", str(folder)]) == 2
    assert "expected folders named trellisnet" in capsys.readouterr().err
