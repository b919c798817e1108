"""Settings of a run: dataclass ↔ command-line flags ↔ JSON.

A flag overrides the `--config` file, which overrides `--preset`, which overrides the default of the field. A setting
`foo: bool` becomes the flags `--foo` and `--no-foo`.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import itertools
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from trellisnet import serialization, weights
from trellisnet.data import PROJECT
from trellisnet.errors import NAME, ArgumentError, UserError, shown
from trellisnet.training.hardware import HardwareConfig
from trellisnet.training.settings import GROUPS, Setting, Settings, default_of, flag_of, properties_of, setting

SWITCHED = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
SCHEDULES = ("step", "cosine", "onecycle")
RUN_FOLDER = "(last.pt of the run folder)"  # value of --resume without a file
# What a run chose for its own machine is chosen again for this one.
AUTOMATIC = dict.fromkeys(("device", "backend", "gemm", "gates", "cuda_graph"), "auto") | {"threads": 0}
RUN, OPTIMISATION, EVALUATION = "run and checkpoints", "optimisation", "evaluation"


@dataclasses.dataclass(kw_only=True)
class RunConfig(HardwareConfig):
    """Settings that every train.py has; tasks add settings, defaults and presets of their own."""

    task: ClassVar[str]
    presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}}
    default_data: ClassVar[str] = ""  # folder in the project
    data_settings: ClassVar[tuple[str, ...]] = ("data",)  # determine the meaning of ids or positions

    name: str = setting(
        "", "name of the run; its folder is runs/{task}/NAME unless --out is given", group=RUN, resumable=True
    )
    preset: str = setting("default", "named settings to start from", group=RUN)
    config: str = setting(
        "", "JSON file of settings, or a run's folder with its config.json; flags override it", group=RUN, process=True
    )
    out: str = setting("", "folder of the run; default: runs/{task}/NAME in the project", group=RUN, process=True)
    resume: str = setting(
        "", "continue the run in --out, or from FILE, or from the last.pt in a folder", group=RUN, process=True
    )
    overwrite: bool = setting(False, "delete an earlier run in the folder", group=RUN, process=True)
    load: str = setting(
        "", "refused: a pickled model can run code; use --load_weight", group=RUN, process=True, hidden=True
    )
    load_weight: str = setting(
        "", "start from weights in the authors' layout (.pkl), or from a run's folder", group=RUN
    )
    run: str = setting(
        "", "with --eval: run folder or shipped model to take settings and weights from; flags override its settings",
        group=EVALUATION, process=True,
    )  # fmt: skip
    eval: bool = setting(False, "score the validation and test data without training", group=EVALUATION, process=True)
    metrics: str = setting("", "write one JSON object with the results to FILE", group=EVALUATION, process=True)

    data: str = setting(
        "", "folder of the data, or 'synthetic'; default: {default_data} in the project", group="data", resumable=True
    )
    download: bool = setting(
        True, "download published data if they are missing from their default folder", group="data", process=True
    )
    seed: int = setting(1111, "seed of all random numbers", group=OPTIMISATION, at_least=0, bits=63)

    optim: str = setting("SGD", "optimiser: a class of torch.optim", group=OPTIMISATION)
    lr: float = setting(1e-3, "initial learning rate", group=OPTIMISATION, at_least=0)
    clip: float = setting(0.0, "gradient-norm clip; 0: none", group=OPTIMISATION, at_least=0)
    wdecay: float = setting(0.0, "weight decay of the optimiser", group="regularisation", at_least=0)
    epochs: int = setting(1, "total number of epochs", group=OPTIMISATION, resumable=True, at_least=1)
    max_steps: int = setting(
        0, "stop after a total of N updates; 0: no limit", group=OPTIMISATION, resumable=True, at_least=0
    )
    max_eval_tokens: int = setting(
        0, "score only N tokens of each split, and mark the result as partial; 0: all", group=EVALUATION, at_least=0
    )
    batch_size: int = setting(16, "rows in a training batch", group=OPTIMISATION, at_least=1)
    eval_batch_size: int = setting(10, "rows in a validation or test batch", group=EVALUATION, at_least=1)
    momentum: float = setting(0.0, "momentum, if the optimiser has one", group=OPTIMISATION, rate="probability")
    ema: float = setting(
        0.0, "score and save an exponential moving average of the weights with this decay per update; 0: none",
        group=OPTIMISATION, rate="share",
    )  # fmt: skip
    label_smoothing: float = setting(
        0.0, "share of each training target spread evenly over all classes", group="regularisation", rate="share"
    )
    schedule: str = setting(
        "step", "learning rate: step follows --when, --decay and --anneal; the others span the run (momentum is kept)",
        group=OPTIMISATION, choices=SCHEDULES,
    )  # fmt: skip
    warmup: int = setting(
        0, "updates at the start over which the learning rate rises; 0: none, or 30 % of the run with onecycle",
        group=OPTIMISATION, at_least=0,
    )  # fmt: skip
    when: list[int] = setting(
        [-1], "divide the learning rate by 10 after these epochs", group=OPTIMISATION, step_rule=True
    )
    decay: float = setting(
        1.0, "divide the learning rate by this after every epoch, starting with epoch --decay_from",
        group=OPTIMISATION, step_rule=True, at_least=1,
    )  # fmt: skip
    decay_from: int = setting(1, "first epoch of --decay", group=OPTIMISATION, step_rule=True, at_least=1)
    anneal: int = setting(
        0, "plateau patience in epochs; 0: no annealing on plateaus", group=OPTIMISATION, step_rule=True, at_least=0
    )
    skip_bad_steps: int = setting(
        0, "skip up to N steps with a non-finite loss or gradient", group=OPTIMISATION, resumable=True, at_least=0
    )
    accumulate: int = setting(
        1, "save memory: compute each batch in N slices of rows, with a single update", group=OPTIMISATION, at_least=1
    )
    checkpoint_minutes: float = setting(
        10.0, "also write last.pt every N minutes within an epoch; 0: never", group=RUN, resumable=True, at_least=0
    )
    checkpoint_steps: int = setting(
        0, "also write last.pt every N updates; 0: never", group=RUN, resumable=True, at_least=0
    )
    tensorboard: bool = setting(
        False, "also write the numbers of metrics.jsonl for TensorBoard", group=RUN, resumable=True
    )
    log_interval: int = setting(
        100, "batches between log lines", group=RUN, flag="--log-interval", resumable=True, at_least=1
    )

    @classmethod
    def program(cls) -> str:
        """Return the path of the program within the project."""
        return f"{cls.task}/train.py"

    @classmethod
    def preset_names(cls) -> list[str]:
        """Return the values that `--preset` takes."""
        return list(cls.presets)

    @classmethod
    def preset_of(cls, explicit: dict[str, Any]) -> str:
        """Return the name of the preset that these explicit settings start from."""
        return explicit.get("preset", "default")

    @classmethod
    def is_listed(cls, name: str) -> bool:
        """Return whether `--help` lists a setting."""
        return not properties_of(cls, name).hidden

    def validate(self) -> None:
        """Check all settings, as in :meth:`trellisnet.training.settings.Settings.validate`."""
        if self.load:
            raise UserError(
                f"--load {self.load}: refused, because a pickled model can run any code when it is opened; save its "
                "weights with torch.save(model.state_dict(), FILE) where it was made, and pass --load_weight FILE"
            )
        super().validate()
        if self.accumulate > self.batch_size:
            raise UserError(f"--accumulate {self.accumulate}: more slices than the --batch_size {self.batch_size} rows")
        for field in dataclasses.fields(self):
            rule = properties_of(self, field.name).step_rule and self.schedule != "step"
            if rule and getattr(self, field.name) != self.preset_value(field.name):
                raise UserError(
                    f"{flag_of(self, field.name)}: has no effect with --schedule {self.schedule}; leave one of the "
                    "two out"
                )
        if self.schedule == "onecycle" and self.warmup == 1:
            raise UserError("--warmup 1: with --schedule onecycle expected 0 or at least 2 updates")
        self.check_purpose()

    def check_purpose(self) -> None:
        """Raise UserError if the flags ask this process for more than one thing."""
        if self.eval and self.resume:
            raise UserError("--eval and --resume exclude each other: to score a run pass --run FOLDER --eval")
        if self.run and not self.eval:
            raise UserError(
                f"--run {self.run}: scores a run, with --eval; continue it with --resume {self.run}, or start another "
                f"one from its weights with --config {self.run} --load_weight {self.run}"
            )
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other: one continues a run, the other deletes it")

    def preset_value(self, name: str) -> Any:
        """Return the value that a setting has without flags and --config."""
        return self.presets[self.preset].get(name, default_of(self.__dataclass_fields__[name]))

    def fixed(self, name: str) -> str:
        """Say why a setting must not change when this run is resumed; empty if it may."""
        if self.schedule != "step" and name in ("epochs", "max_steps"):
            return f"--schedule {self.schedule} spreads the learning rate over all updates of the run"
        return "" if properties_of(self, name).may_change else "a resumed run keeps its settings"

    def depth(self, epoch: int, update: int | None = None) -> int | None:
        """Return the number of layers to train with; None for that of the model, which never changes.

        Args:
            epoch: counted from 0.
            update: number of updates before this one; None for the validation after the epoch.
        """
        return None

    def scoring_depths(self) -> list[int]:
        """Return the numbers of layers among which validation chooses that of all scores; [] for the model's own."""
        return []

    def is_continued(self) -> bool:
        return bool(self.resume)

    def notices(self, device: torch.device) -> list[str]:
        return [] if self.eval else super().notices(device)  # only training steps become graphs

    def recipe(self) -> dict[str, Any]:
        """Return the training settings that a score is reported with, by name."""
        recipe = {name: getattr(self, name) for name in ("schedule", "warmup", "ema", "label_smoothing")}
        return recipe | {"load_weight": self.load_weight.removeprefix(f"{PROJECT}{os.sep}")}  # as in the command

    def marks(self) -> dict[str, bool]:
        """Return the marks on the scores of weights that were loaded and not trained further."""
        return {}

    def load_options(self) -> dict[str, Any]:
        """Return further arguments for :func:`trellisnet.weights.load_weights`."""
        return {}

    @contextlib.contextmanager
    def in_flags(self) -> Iterator[None]:
        """Translate the arguments that an error of the library advises into flags."""
        try:
            yield
        except ArgumentError as e:
            names = {field.name for field in dataclasses.fields(self)}
            if not names.issuperset(self.settings_of(e.arguments)):
                raise UserError(f"{e.line}, for which {self.task} has no flag") from e
            raise UserError(e.advise(self.flags(e.arguments))) from e

    def flags(self, arguments: dict[str, Any]) -> str:
        """Return the flags for arguments of the library; `...` is a value that only the user knows."""
        words, unknown = [], []
        for name, value in self.settings_of(arguments).items():
            flag = flag_of(self, name)
            if value is ...:
                unknown.append(f"the {flag}")
            elif isinstance(value, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
            else:
                values = value if isinstance(value, list) else [0 if value is None else value]
                words += [flag, *map(str, values)]
        return " ".join(words) + (f"{' and '.join(unknown)} that it was trained with" if unknown else "")

    def settings_of(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the settings that correspond to arguments of the library."""
        settings = dict(arguments)
        return settings | dict.fromkeys(self.data_settings, settings.pop("data")) if "data" in settings else settings

    def folder(self) -> Path:
        """Return the run folder: --out, or runs/<task>/<name> in the project."""
        return Path(self.out) if self.out else PROJECT / "runs" / self.task / self.name

    def data_folder(self) -> str:
        """Return --data, or the default folder in the project."""
        return self.data or str(PROJECT / self.default_data)


Config = TypeVar("Config", bound=RunConfig)


def did_you_mean(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> str:
    """Return "; did you mean X?" with the name that resembles `word` and those that contain it, or "" if none does."""
    names = {name.lower(): name for name in candidates}
    near = difflib.get_close_matches(word.lower(), names, n=1, cutoff=cutoff)
    if word.lower() not in names and len(word) >= 3:
        near += [name for name in names if word.lower() in name and name not in near]
    return f"; did you mean {' or '.join(names[name] for name in near)}?" if near else ""


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line and suggest the nearest flag or choice."""

    def __init__(self, **options: Any):
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = did_you_mean(unknown[0].split("=")[0], flags, cutoff=0.8)
            raise UserError(f"unknown argument {unknown[0]}{near or '; --help lists the flags'}")
        return parsed

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see --help")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        args = sys.argv[1:] if args is None else list(args)
        switches = {flag: action for action in self._actions if action.nargs == 0 for flag in action.option_strings}
        if any(not action.option_strings for action in self._actions):  # the next argument may be positional
            switches = {}
        for argument, following in itertools.zip_longest(args, args[1:], fillvalue=""):
            flag, equals, value = argument.partition("=")
            value = value if equals else following
            if flag in switches and value.lower() in SWITCHED:
                on = SWITCHED[value.lower()] != flag.startswith("--no-")
                wanted = [f for f in switches[flag].option_strings if f.startswith("--no-") != on]
                advice = f"did you mean {wanted[0]}?" if wanted else "leave it out"
                raise UserError(f"{flag} {value}: the flag takes no value; {advice}")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = list(map(str, action.choices))
            near = did_you_mean(str(value), names) or f"; choose from {', '.join(names)}"
            flag = "/".join(action.option_strings) or action.metavar or action.dest
            raise UserError(f"argument {flag}: invalid choice: {value!r}{near}")


def whole_number(text: str) -> int:
    """Read an int, also one that is spelled as a float, such as the authors' `12.0` and `1e4`."""
    try:
        return int(text)
    except ValueError:
        with contextlib.suppress(ValueError):
            if (number := float(text)).is_integer():
                return int(number)
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None


_READERS = {int: whole_number, list[int]: whole_number, list[str]: str, list[float]: float}


def _reader(kind: type, properties: Setting) -> Callable[[str], Any]:
    """Return the function that reads a single value of a setting."""
    read, word = _READERS.get(kind, kind), properties.word
    if not word:
        return read
    special = word if isinstance(properties.special, list) else properties.special

    def number(text: str) -> Any:
        if text == word:
            return special
        if (value := read(text)) == special:  # as in config.json; a user who types it means the number
            raise argparse.ArgumentTypeError(f"expected at least {properties.at_least}, or {word}, got {text}")
        return value

    return number


class _Values(argparse.Action):
    """Store a list, or the special value of a setting for its word."""

    def __init__(self, properties: Setting, **options: Any):
        super().__init__(**options)
        self.properties = properties

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        word = self.properties.word
        if word and word in values and len(values) > 1:
            raise argparse.ArgumentError(self, f"{word} stands alone, got {' '.join(map(str, values))}")
        setattr(namespace, self.dest, list(self.properties.special) if values == [word] else values)


def build_parser(cls: type[RunConfig]) -> argparse.ArgumentParser:
    """Return a parser with a flag per setting. Its result holds only the flags on the command line."""
    hints = typing.get_type_hints(cls)
    parser = Parser(
        prog=cls.program(),
        usage="%(prog)s [flags]",
        description=f"{cls.__doc__} Presets: {', '.join(cls.presets)}.",
        argument_default=argparse.SUPPRESS,
    )
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for field in dataclasses.fields(cls):
        properties, kind = properties_of(cls, field.name), hints[field.name]
        flag = flag_of(cls, field.name)
        names = [flag, f"--{field.name}"] if flag != f"--{field.name}" else [flag]
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        options["help"] = _help(cls, field) if cls.is_listed(field.name) else argparse.SUPPRESS
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.name == "resume":
            options |= {"nargs": "?", "const": RUN_FOLDER, "metavar": "FILE"}
        elif field.name == "preset":
            options["choices"] = cls.preset_names()
        elif isinstance(kind, types.GenericAlias):
            options |= {"nargs": "+", "type": _reader(kind, properties), "metavar": properties.metavar or "N"}
            options["action"] = functools.partial(_Values, properties)
        else:
            options |= {"type": _reader(kind, properties), "choices": properties.choices}
            options["metavar"] = None if properties.choices else properties.metavar or kind.__name__.upper()
        groups[properties.group].add_argument(*names, **options)
    return parser


def _help(cls: type[RunConfig], field: dataclasses.Field) -> str:
    """Return the help text of a setting, with its default unless the text states it."""
    text = properties_of(cls, field.name).help.format(task=cls.task, default_data=cls.default_data)
    return (text if "default:" in text else f"{text} (default: {default_text(field)})").replace("%", "%%")


def default_text(field: dataclasses.Field) -> str:
    """Return the default of a setting as a user would type it; a switch is on or off."""
    default = default_of(field)
    if isinstance(default, list):
        default = " ".join(map(str, default))
    if isinstance(default, bool):
        default = "on" if default else "off"
    return "none" if default == "" else str(default)


def parse(cls: type[Config], argv: Sequence[str]) -> tuple[Config, dict[str, Any]]:
    """Read the settings of a command line.

    Returns:
        the settings, validated unless they continue a run, and those among them that come from flags or the `--config`
        file.

    Raises:
        UserError: an unknown flag or an invalid value.
    """
    flags = vars(build_parser(cls).parse_args(argv))
    stored: dict[str, Any] = {}
    if flags.get("run"):
        if doubled := [name for name in ("config", "load_weight", "resume") if flags.get(name)]:
            raise UserError(f"--run and --{doubled[0]} exclude each other: --run names settings and weights at once")
        flags["run"] = str(find_run(flags["run"]))
        stored = read_config_file(cls, flags["run"], "--run") | AUTOMATIC | {"load_weight": flags["run"]}
    elif "config" in flags:
        if sum(argument.partition("=")[0] == "--config" for argument in argv) > 1:  # argparse keeps the last
            raise UserError("--config: expected one file, got several; join them, or pass the rest as flags")
        stored = read_config_file(cls, flags["config"])
    explicit = stored | flags
    if "preset" in explicit:
        explicit["preset"] = cls.preset_of(explicit)
    if "preset" in flags and explicit["preset"] in cls.presets and explicit["preset"] != stored.get("preset"):
        presets = [cls.presets[explicit["preset"]]] if cls.presets[explicit["preset"]] else cls.presets.values()
        if set().union(*presets) <= stored.keys():  # the file is that of a run, which has all settings
            flag = "run" if flags.get("run") else "config"
            raise UserError(
                f"--preset {flags['preset']}: has no effect beside --{flag} {flags[flag]}, which sets all that the "
                "preset would; leave one of the two out"
            )
    config = _laid_over(cls, explicit)
    if config.resume:  # what the flags leave out is not the default but the run's own, with which it is validated
        config.check_purpose()
    else:
        config.validate()
    return config, explicit


def from_settings(cls: type[Config], explicit: dict[str, Any]) -> Config:
    """Lay explicit settings over their preset and the defaults of `cls`, and validate the result."""
    config = _laid_over(cls, explicit)
    config.validate()
    return config


def _laid_over(cls: type[Config], explicit: dict[str, Any]) -> Config:
    preset = cls.preset_of(explicit)
    if preset not in cls.presets:
        near = did_you_mean(str(preset), cls.presets)
        raise UserError(f"--preset: expected one of {', '.join(cls.presets)}, got {shown(repr(preset), NAME)}{near}")
    return cls(**{**cls.presets[preset], **explicit, "preset": preset})


def from_run(cls: type[Config], stored: dict[str, Any], where: str, changes: dict[str, Any]) -> Config:
    """Read the stored settings of a run into a base class of its own, which lacks some of them and has no presets.

    Args:
        cls: the class of the result.
        stored: the settings of the run.
        where: name of their file.
        changes: settings that replace stored ones.

    Raises:
        UserError: a value of another type or out of range.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    kept = check_settings(cls, {name: value for name, value in stored.items() if name in names}, where)
    config = cls(**kept | {"preset": "default"} | changes)
    Settings.validate(config)  # of each setting; those of tasks and presets have been checked before training
    return config


def read_config_file(cls: type[RunConfig], path: str, flag: str = "--config") -> dict[str, Any]:
    """Read settings from a JSON file, such as the config.json of a run, or from the folder of a run.

    Raises:
        UserError: the file cannot be read, holds no JSON object, an unknown setting or a value of another type.
    """
    if os.path.isdir(path):
        folder, path = path, os.path.join(path, "config.json")
        if not os.path.isfile(path):
            raise UserError(f"{flag} {folder}: the folder holds no config.json; name a run's folder or a JSON file")
    content, task = _read_json(path, f"{flag} {path}"), None
    if isinstance(content, dict):
        task, content = content.get("task"), content.get("settings", content)
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path}: expected a JSON object of settings")
    if task not in (None, cls.task):
        raise UserError(
            f"{flag} {path}: holds settings of {shown(task, NAME)}, not of {cls.task}; name a run of this task"
        )
    settings = check_settings(cls, content, f"{flag} {path}")
    data = settings.get("data", "")
    if data not in ("", "synthetic") and Path(path).absolute().parent in weights.shipped():
        settings["data"] = str(PROJECT / data)  # scripts/export.py names folders in the project
    return settings


def find_run(run: str | os.PathLike) -> Path:
    """Return the folder of a run: `run` itself, or the shipped model of that name.

    Raises:
        UserError: neither exists.
    """
    if (folder := Path(run)).is_dir():
        return folder
    shipped = {path.name: path for path in weights.shipped()}
    if str(run) in shipped:
        return shipped[str(run)]
    advice = f"name the folder of a run, or one of {', '.join(shipped)}" if shipped else "name the folder of a run"
    raise UserError(f"{run}: no such folder{did_you_mean(str(run), shipped) or f'; {advice}'}")


def read_run_config(folder: str | os.PathLike) -> dict[str, Any]:
    """Read the config.json of a run; its "task" is a text and its "settings" are a dict, both not checked further.

    Raises:
        UserError: it is missing, unreadable or not one of a run.
    """
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file; name the folder of a run")
    content = _read_json(path, path)
    if not isinstance(content, dict) or not (
        isinstance(content.get("task"), str) and isinstance(content.get("settings"), dict)
    ):
        raise UserError(f"{path}: names no task and settings; expected the config.json of a run")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of its pairs; JSON itself would keep the last of equal names."""
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"it holds {shown(repr(name), NAME)} twice; delete one of them")
        content[name] = value
    return content


def _read_json(path: str, where: str) -> Any:
    try:
        return json.loads(serialization.read_regular(path), object_pairs_hook=_once)
    except OSError as e:
        raise UserError(f"{where}: cannot be read ({e.strerror})") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not JSON ({e})") from e


def check_settings(cls: type[RunConfig], content: dict[str, Any], where: str) -> dict[str, Any]:
    """Return `content` with every value converted to the type of its setting.

    Raises:
        UserError: an unknown setting, or a value of another type; `where` begins the message.
    """
    hints = typing.get_type_hints(cls)
    fields = [field.name for field in dataclasses.fields(cls)]
    checked = {}
    for name, value in content.items():
        if name not in fields:
            raise UserError(f"{where}: unknown setting {shown(repr(name), NAME)}{did_you_mean(str(name), fields)}")
        properties = properties_of(cls, name)
        if properties.process:
            raise UserError(f"{where}: {name} is not stored in files; pass it on the command line")
        kind = hints[name]
        plain = list if isinstance(kind, types.GenericAlias) else kind
        if properties.word and value in (properties.word, [properties.word]):
            value = properties.special
        if plain is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
            value = float(value)
        elif plain is int:
            value = _whole(value)
        elif kind == list[int] and isinstance(value, list):
            value = [_whole(number) for number in value]
        choices = properties.choices
        if choices and value not in choices:
            near = did_you_mean(str(value), choices)
            raise UserError(
                f"{where}: {name} expects one of {', '.join(choices)}, got {shown(repr(value), NAME)}{near}"
            )
        fits = isinstance(value, plain) and (plain is bool or not isinstance(value, bool))
        texts = [value] if plain is str else value if kind == list[str] else []
        if plain is list and kind != list[str]:
            fits = fits and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        # Most texts become parts of file names.
        fits = fits and all(isinstance(text, str) and _is_text_of_system(text) for text in texts)
        if not fits:
            raise UserError(f"{where}: {name} expects {plain.__name__}, got {shown(repr(value), NAME)}")
        checked[name] = value
    return checked


def _whole(value: Any) -> Any:
    """Turn a float without a fraction into an int; leave everything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_text_of_system(text: str) -> bool:
    """Return whether the text can be a command-line argument; JSON may contain zero bytes and lone surrogates."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def to_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that are stored in JSON and checkpoints: all but instructions to this process."""
    return {
        name: value for name, value in dataclasses.asdict(config).items() if not properties_of(config, name).process
    }
