"""Settings: flags, presets, files and error messages."""

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from char_ptb.model import Config as CharConfig
from pmnist.model import Config as PixelConfig
from trellisnet.errors import UserError
from trellisnet.training.config import PROJECT, RUN_FOLDER, build_parser, parse, to_settings
from trellisnet.training.settings import GROUPS, Settings, flag_of, properties_of, setting
from word_ptb.model import Config


def config(*argv):
    return parse(Config, argv)[0]


def test_defaults_are_those_of_the_authors_script():
    c = config()
    released = {
        "emsize": 400, "nhid": 1000, "nout": 400, "lr": 20, "clip": 0.225, "epochs": 500, "batch_size": 16,
        "nlevels": 58, "horizon": 58, "dropout": 0.45, "dropouti": 0.45, "wdrop": 0.5, "emb_dropout": 0.1,
        "dropouth": 0.28, "wdecay": 1.2e-6, "tied": True, "seed": 1111, "anneal": 10, "cuda": True, "wnorm": False,
        "temporalwdrop": True, "optim": "SGD", "repack": False, "eval": False, "alpha": 2, "beta": 1, "aux": 0.05,
        "aux_freq": 12, "seq_len": 110, "log_interval": 100, "when": [-1], "ksize": 2, "dilation": [1],
        "eval_batch_size": 12, "name": "Trellis_wordPTB", "load": "", "load_weight": "", "asgd": False,
        "n_experts": 0, "dropoutl": 0.29,
    }  # fmt: skip
    assert {name: getattr(c, name) for name in released} == released


def test_flags_are_spelled_as_in_the_authors_script():
    flags = {flag for action in build_parser(Config)._actions for flag in action.option_strings}
    theirs = """data name emsize nhid nout lr clip epochs batch_size nlevels horizon dropout dropouti wdrop emb_dropout
    dropouth wdecay tied seed anneal cuda wnorm temporalwdrop optim repack eval alpha beta aux aux_freq seq_len
    log-interval when ksize dilation load load_weight asgd n_experts dropoutl""".split()
    assert {f"--{name}" for name in theirs} <= flags
    assert flag_of(Config, "log_interval") == "--log-interval"


def test_values_of_every_type():
    c = config(
        "--nhid", "7", "--wnorm", "--no-tied", "--dilation", "1", "2", "4", "--when", "-1", "--aux_freq", "12.0",
        "--log-interval", "5", "--optim", "Adam", "--lr=2e-3", "--resume",
    )  # fmt: skip
    assert (c.nhid, c.wnorm, c.tied, c.dilation, c.when) == (7, True, False, [1, 2, 4], [-1])
    assert (c.aux_freq, c.log_interval, c.optim, c.lr, c.resume) == (12, 5, "Adam", 2e-3, RUN_FOLDER)


def test_flags_override_files_override_presets_override_defaults(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"settings": {"preset": "tiny", "nlevels": 9, "epochs": 3}}))
    c = config("--config", str(path), "--epochs", "4")
    assert (c.epochs, c.nlevels, c.emsize, c.lr) == (4, 9, Config.presets["tiny"]["emsize"], 20)
    assert config("--config", str(path), "--preset", "paper", "--aux", "0").emsize == 400


def test_scores_without_history_are_announced():
    deep = ["--eval", "--load_weight", "w", "--nlevels", "120", "--horizon", "auto"]
    (notice,) = config(*deep).notices(torch.device("cpu"))
    assert notice.startswith("NOTICE: --seq_len 110 does not exceed --horizon 120, so windows of 120 positions are ")
    assert config(*deep, "--seq_len", "130").notices(torch.device("cpu")) == []
    assert config(*deep[:3], "--seq_len", "0", "--repack").notices(torch.device("cpu")) == []


def test_a_length_without_effect_is_announced():
    long = parse(CharConfig, ["--seq_len", "200"])[0]
    (notice,) = long.notices(torch.device("cpu"))
    assert notice == "NOTICE: --seq_len 200 has no effect with --repack, which makes windows of --horizon 140 positions"
    for flags in (["--seq_len", "200", "--no-repack"], []):
        assert parse(CharConfig, flags)[0].notices(torch.device("cpu")) == []


def test_settings_survive_json(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(to_settings(config("--preset", "small", "--dilation", "1", "2"))))
    again = config("--config", str(path))
    assert (again.dilation, again.emsize) == ([1, 2], Config.presets["small"]["emsize"])
    assert config("--config", str(path), "--preset", "small") == dataclasses.replace(again, config=str(path))
    for preset in ("paper", "default"):
        with pytest.raises(UserError, match=rf"^--preset {preset}: has no effect beside --config .*, which sets all "):
            config("--config", str(path), "--preset", preset)
    path.write_text('{"lr": 9}')
    assert config("--config", str(path), "--preset", "default").lr == 9


def test_lists_are_not_shared_between_configurations():
    config().dilation.append(9)
    assert config().dilation == [1]


def test_defaults_are_relative_to_the_project_and_typed_paths_to_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert config().data_folder() == str(PROJECT / "data" / "penn")
    assert config("--data", "mine").data_folder() == "mine"
    assert config("--data", "data/penn").data_folder() == "data/penn"
    assert config("--data", "synthetic").data_folder() == "synthetic"
    assert config().folder() == PROJECT / "runs" / "word_ptb" / "Trellis_wordPTB"
    assert config("--preset", "small").folder().name == "small"
    assert str(config("--out", "x").folder()) == "x"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nlevel", "3"], "unknown argument --nlevel; did you mean --nlevels?"),
        (["--nlevels", "many"], "argument --nlevels: expected a whole number, got 'many'; see --help"),
        (
            ["--preset", "huge"],
            "argument --preset: invalid choice: 'huge'; choose from default, paper, paper-mos, small",
        ),
        (["--preset", "tini"], "argument --preset: invalid choice: 'tini'; did you mean tiny?"),
        (["--model", "lstm"], "argument --model: invalid choice: 'lstm'; did you mean awd-lstm or sparse-lstm?"),
        (["--model", "TCN"], "argument --model: invalid choice: 'TCN'; did you mean tcn?"),
        (
            ["--backend", "fast"],
            "argument --backend: invalid choice: 'fast'; choose from auto, reference, fused, triton",
        ),
        (["--precision=bf32"], "argument --precision: invalid choice: 'bf32'; did you mean "),
        (["--tied", "False"], "--tied False: the flag takes no value; did you mean --no-tied?"),
        (["--tied=0", "--nhid", "3"], "--tied 0: the flag takes no value; did you mean --no-tied?"),
        (["--wnorm", "true"], "--wnorm true: the flag takes no value; did you mean --wnorm?"),
        (["--nhid", "3", "--no-cuda", "no"], "--no-cuda no: the flag takes no value; did you mean --cuda?"),
        (["--nlevels", "0"], "--nlevels: expected at least 1, got 0"),
        (["--ksize", "1"], "--ksize: expected at least 2, got 1"),
        (["--dilation", "0"], r"--dilation: expected integers ≥ 1, got [0]"),
        (["--dropout", "1.0"], "--dropout: expected a probability in [0, 1), got 1.0"),
        (["--dropouth", "nan"], "--dropouth: expected a finite number, got nan"),
        (["--lr", "inf"], "--lr: expected a finite number, got inf"),
        (["--lr", "-1"], "--lr: expected at least 0, got -1.0"),
        (["--clip", "nan"], "--clip: expected a finite number, got nan"),
        (["--aux_freq", "inf", "--aux", "0"], "argument --aux_freq: expected a whole number, got 'inf'"),
        (["--seed", str(2**70)], "--seed: expected less than 2**63"),
        (["--n_expert", "3"], "unknown argument --n_expert; did you mean --n_experts?"),
        (["--frobnicate", "3"], "unknown argument --frobnicate; --help lists the flags"),
        (["--n_experts", "-1"], "--n_experts: expected at least 0, got -1"),
        (["--accumulate", "17"], "--accumulate 17: more slices than the --batch_size 16 rows"),
        (["--nout", "300"], "--nout 300: tied weights need --nout equal to --emsize 400"),
        (["--aux_freq", "12.5"], "argument --aux_freq: expected a whole number, got '12.5'"),
        (["--dilation", "1", "2.5"], "argument --dilation: expected a whole number, got '2.5'"),
        (["--aux_freq", "0"], "--aux_freq: expected at least 1, got 0"),
        (["--aux_freq", "59"], "--aux_freq 59: larger than --nlevels 58"),
        (["--seq_len", "58"], "--seq_len 58: must be larger than --horizon 58"),
        (["--seq_len", "20", "--repack"], "--seq_len 20: with --repack expected 0 or more than --horizon 58"),
        (["--log-interval", "0"], "--log-interval: expected at least 1, got 0"),
        (["--load", "m.pt"], "--load m.pt: refused, because a pickled model can run any code"),
        (["--eval", "--resume"], "--eval and --resume exclude each other"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["--config", "nothing.json"], "--config nothing.json: cannot be read"),
        (["--schedule", "linear"], "argument --schedule: invalid choice: 'linear'"),
        (["--schedule", "cosine", "--anneal", "3"], "--anneal: has no effect with --schedule cosine"),
        (["--schedule", "onecycle", "--asgd"], "--asgd: has no effect with --schedule onecycle"),
        (["--ema", "0.9", "--asgd"], "--ema: --asgd averages the weights as well; leave one of the two out"),
        (["--ema", "0.9", "--nonmono", "3"], "--ema: --nonmono 3 averages the weights as well; leave one"),
        (["--asgd", "--anneal", "0"], "--asgd: begins on a plateau, of which --anneal 0 finds none; pass --nonmono N"),
        (["--anneal_by", "2", "--anneal", "0"], "--anneal_by 2: divides the learning rate on plateaus, of which these"),
        (["--asgd", "--model", "rhn"], "--asgd: begins on a plateau, of which --anneal 0 finds none"),
        (["--horizon", "0"], "argument --horizon: expected at least 1, or auto, got 0"),
        (["--eval_nlevels", "-1", "--eval_depths", "3"], "--eval_nlevels: expected at least 0, or auto, got -1"),
        (["--mos_epsilon", "-2"], "--mos_epsilon: expected at least 0, or -1 for the default, got -2.0"),
        (["--label_smoothing", "0.1", "--n_experts", "3"], "--label_smoothing: needs the log-probabilities of all"),
    ],
)
def test_invalid_settings_are_named(argv, message):
    with pytest.raises(UserError) as e:
        config(*argv)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object"),
        ('{"nlevls": 3}', "unknown setting 'nlevls'; did you mean nlevels?"),
        ('{"preset": "tini"}', "got 'tini'; did you mean tiny?"),
        ('{"model": "lstm"}', "got 'lstm'; did you mean awd-lstm or sparse-lstm?"),
        ('{"nlevels": "3"}', "nlevels expects int, got '3'"),
        ('{"wnorm": 1}', "wnorm expects bool, got 1"),
        ('{"nlevels": 3.5}', "nlevels expects int, got 3.5"),
        ('{"nlevels": Infinity}', "nlevels expects int, got inf"),
        ('{"nlevels": true}', "nlevels expects int, got True"),
        ('{"dilation": [1, 0.5]}', "dilation expects list, got [1, 0.5]"),
        ('{"settings": 5}', "expected a JSON object"),
        (r'{"name": "a\u0000b"}', r"name expects str, got 'a\x00b'"),
        (r'{"data": "\ud800"}', r"data expects str, got '\ud800'"),
        ('{"backend": "fast"}', "backend expects one of auto, reference, fused, triton, got 'fast'"),
        ('{"overwrite": true}', "overwrite is not stored in files; pass it on the command line"),
        ('{"lr": 1' + "0" * 400 + "}", "lr expects float"),
        ("[" * 100_000, "not JSON"),
        ('{"task": "word_ptb", "settings": {"lr": 5, "clip": 1, "lr": 20}}', "it holds 'lr' twice; delete one of them"),
    ],
)
def test_invalid_files_are_named(tmp_path, content, message):
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(UserError) as e:
        config("--config", str(path))
    assert message in str(e.value)


def test_files_may_hold_integers_for_floats(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"lr": 5}')
    assert config("--config", str(path)).lr == 5.0


def test_whole_numbers_may_be_spelled_as_floats(tmp_path):
    spelled = config("--aux_freq", "12.0", "--nhid", "1e3", "--dilation", "1", "2.0", "--seed", "1e3")
    assert (spelled.aux_freq, spelled.nhid, spelled.dilation, spelled.seed) == (12, 1000, [1, 2], 1000)
    assert {type(n) for n in (spelled.aux_freq, spelled.nhid, *spelled.dilation)} == {int}
    (tmp_path / "c.json").write_text('{"aux_freq": 16.0, "dilation": [1, 2.0]}')
    from_file = config("--config", str(tmp_path / "c.json"))
    assert to_settings(from_file)["aux_freq"] == 16
    assert {type(n) for n in (from_file.aux_freq, *from_file.dilation)} == {int}


def test_windows_that_cannot_be_trained_may_be_scored():
    assert config("--eval", "--seq_len", "0").seq_len == 0
    assert config("--aux", "0", "--aux_freq", "1e4").aux_freq == 1e4


@pytest.mark.parametrize(
    ("argv", "epsilon"),
    [
        ([], 0),
        (["--eval"], 0),
        (["--load_weight", "w.pkl"], 0),
        (["--eval", "--load_weight", "w.pkl"], 1e-8),
        (["--eval", "--load_weight", "w.pkl", "--mos_epsilon", "0"], 0),
        (["--mos_epsilon", "1e-6"], 1e-6),
    ],
)
def test_the_authors_epsilon_is_used_only_to_score_loaded_weights(argv, epsilon):
    assert config("--n_experts", "2", *argv).log_epsilon() == epsilon


def test_a_second_settings_file_is_refused(tmp_path):
    (tmp_path / "c.json").write_text('{"nlevels": 9}')
    with pytest.raises(UserError, match="--config: expected one file, got several"):
        config("--config", "other.json", f"--config={tmp_path / 'c.json'}")


def test_the_folder_of_a_run_is_a_config(tmp_path):
    (tmp_path / "config.json").write_text('{"task": "word_ptb", "settings": {"nlevels": 9, "aux": 0.0}}')
    assert config("--config", str(tmp_path)).nlevels == 9
    (tmp_path / "config.json").unlink()
    with pytest.raises(
        UserError, match=f"--config {tmp_path}: the folder holds no config.json; name a run's folder or a"
    ):
        config("--config", str(tmp_path))


@dataclass(kw_only=True)
class Parent(Settings):
    rows: int = setting(2, "rows of a batch", group="data", at_least=1, resumable=True)
    steps: list[int] = setting([3], "steps", group="data", at_least=1)
    factor: float = setting(0.0, "divisor", group="data", at_least=1, special=0)
    share: float = setting(0.5, "share", group="data", above=0, at_most=1)
    extra: int = setting(0, "extra", group="data", needs=["rows", "share"])


@dataclass(kw_only=True)
class Child(Parent):
    defaults: ClassVar = {"steps": [5, 6], "rows": 4}
    helps: ClassVar = {"rows": "images of a batch"}


def test_tables_change_only_defaults_and_help_texts():
    assert dataclasses.asdict(Child()) == {"rows": 4, "steps": [5, 6], "factor": 0.0, "share": 0.5, "extra": 0}
    assert dataclasses.asdict(Parent())["steps"] == [3]
    assert properties_of(Child, "rows") == dataclasses.replace(properties_of(Parent, "rows"), help="images of a batch")
    Child().steps.append(9)
    assert Child().steps == [5, 6]
    with pytest.raises(KeyError, match="row"):
        type("Misspelled", (Parent,), {"defaults": {"row": 3}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": 0}, "--rows: expected at least 1, got 0"),
        ({"rows": 2**31}, "--rows: expected less than 2**31, got 2147483648"),
        ({"steps": []}, "--steps: expected integers ≥ 1, got []"),
        ({"steps": [4, 0]}, "--steps: expected integers ≥ 1, got [4, 0]"),
        ({"factor": 0.0}, None),
        ({"factor": 0.5}, "--factor: expected at least 1, or 0 for the default, got 0.5"),
        ({"share": 0.0}, "--share: expected more than 0 and at most 1, got 0.0"),
        ({"share": 1.0}, None),
        ({"share": 1.5}, "--share: expected more than 0 and at most 1, got 1.5"),
        ({"share": 1e39}, "--share: expected at most 3.4e+38 in size, got 1e+39"),
        ({"extra": 1}, None),
    ],
)
def test_a_setting_is_checked_by_its_properties(values, message):
    if message is None:
        return Child(**values).validate()
    with pytest.raises(UserError) as e:
        Child(**values).validate()
    assert str(e.value) == message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cache_tune"], "--cache_tune: has no effect without --cache"),
        (["--dynamic_eval_rule", "sgd"], "--dynamic_eval_rule: has no effect without --dynamic_eval"),
        (["--adapt_rows", "2"], "--adapt_rows: has no effect without --cache or --dynamic_eval"),
    ],
)
def test_a_setting_without_the_one_it_needs_is_refused(flags, message):
    with pytest.raises(UserError) as e:
        config(*flags)
    assert str(e.value) == message


@pytest.mark.parametrize("cls", [Config, CharConfig, PixelConfig], ids=lambda cls: cls.task)
def test_help_is_grouped_and_states_every_default(cls):
    shown = build_parser(cls).format_help()
    titles = [line[:-1] for line in shown.splitlines() if line[:-1] in GROUPS]
    assert titles == [title for title in GROUPS if title in titles]
    assert len(titles) >= len(GROUPS) - 1
    entries = {entry.split()[0].rstrip(","): " ".join(entry.split()) for entry in re.split(r"\n  (?=--)", shown)}
    for field in dataclasses.fields(cls):
        flag = flag_of(cls, field.name)
        assert (flag in entries) == cls.is_listed(field.name)
        assert flag not in entries or "default: " in entries[flag], flag
    assert "{" not in re.sub(r"\{[\w,-]+\}", "", shown)  # placeholders are filled in


def test_flags_of_other_cores_have_a_group_of_their_own():
    group = next(g for g in build_parser(Config)._action_groups if g.title == "settings of other cores")
    assert [action.dest for action in group._group_actions] == ["gate_bias", "rhn_masks", "sparse_mode", "sparse_fract"]
    unlisted = [[f.name for f in dataclasses.fields(c) if not c.is_listed(f.name)] for c in (Config, PixelConfig)]
    assert unlisted == [["load"], ["load", "gate_bias", "rhn_masks"]]  # no core of PixelConfig reads it


def test_help_shows_the_texts_and_defaults_of_the_task():
    shown = " ".join(build_parser(CharConfig).format_help().split())
    assert "dropout of whole symbols of the alphabet (default: 0.02)" in shown
    assert "default: data/penn, or data/NAME, in the project" in shown
    assert "runs/char_ptb/NAME" in shown
    assert "weight normalisation (default: on)" in shown
