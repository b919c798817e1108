"""Settings of a run: dataclass ↔ command-line flags ↔ JSON.

A setting is a dataclass field; its flag, help and default come from the field. Four sources are laid over each other:
flag > `--config` file > `--preset` > default. A setting `foo: bool` gives `--foo / --no-foo`.
"""

import argparse
import contextlib
import dataclasses
import difflib
import itertools
import json
import math
import os
import sys
import types
import typing
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch

from trellisnet import ops, serialization
from trellisnet.data import PROJECT
from trellisnet.errors import NAME, ArgumentError, UserError, shown

GRAPHS = ("auto", "on", "off")
PRECISIONS = ("fp32", "tf32", "bf16")
SCHEDULES = ("step", "cosine", "onecycle")
SWITCHED = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
LARGEST = torch.finfo(torch.float32).max  # of a setting that enters single-precision arithmetic
MOST_THREADS = 1024  # libraries crash where they cannot start as many as they are asked for
RUN_FOLDER = "(last.pt of the run folder)"  # what --resume without a file means


def setting(default: Any, help: str, *, flag: str | None = None, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field that is also a flag; `flag` if it is spelled otherwise than the field."""
    metadata = {"help": help, "flag": flag, "choices": choices}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(kw_only=True)
class RunConfig:
    """What every task's train.py understands. Tasks add their own settings, defaults and presets."""

    task: ClassVar[str]
    presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}}
    default_data: ClassVar[str] = ""  # folder in the project
    data_settings: ClassVar[tuple[str, ...]] = ("data",)  # what decides what ids, or places, stand for
    # What to do now, not what to compute: taken from the command line only, never kept with a run.
    process: ClassVar[frozenset[str]] = frozenset(
        {"config", "out", "resume", "overwrite", "load", "eval", "metrics", "download"}
    )
    # May differ between a run and its continuation (the data are compared by content).
    resumable: ClassVar[frozenset[str]] = process | frozenset(
        {"name", "epochs", "max_steps", "device", "cuda", "threads", "gemm", "gates", "recompute", "recompute_every"}
        | {"log_interval", "data", "cuda_graph"}
        | {"checkpoint_minutes", "checkpoint_steps", "tensorboard", "skip_bad_steps"}
    )

    # The rules of --schedule step.
    stepwise: ClassVar[frozenset[str]] = frozenset({"when", "decay", "decay_from", "anneal"})

    name: str = setting("", "name of the run; its folder is runs/<task>/<name> unless --out is given")
    preset: str = setting("default", "named settings to start from")
    config: str = setting("", "JSON file of settings, or a run's folder with its config.json; flags override it")
    out: str = setting("", "folder of the run")
    resume: str = setting("", "continue the run in --out (or from FILE)")
    overwrite: bool = setting(False, "delete an earlier run in the folder")
    load: str = setting("", "refused: a pickled model can run code; use --load_weight")
    load_weight: str = setting("", "start from weights in the authors' layout (.pkl), or from those in a run's folder")
    eval: bool = setting(False, "only score the validation and test data")
    metrics: str = setting("", "write one JSON object with the results to FILE")

    data: str = setting("", "folder of the data, or 'synthetic'; default: data/<corpus> in the project")
    download: bool = setting(True, "fetch published data that are missing in their default folder")
    seed: int = setting(1111, "seed of all random numbers")
    cuda: bool = setting(True, "use a CUDA device if there is one")
    device: str = setting("auto", "any torch device, or auto: cuda if there is one and --cuda, else cpu")
    threads: int = setting(0, "CPU threads; 0: torch's choice")
    backend: str = setting("auto", "trellis operator", choices=ops.BACKENDS)
    gemm: str = setting("auto", "products of the fused operator; auto: what is fastest here", choices=ops.GEMMS)
    gates: str = setting("auto", "gates of the fused operator; auto: compiled if built", choices=ops.GATE_KERNELS)
    precision: str = setting(
        "fp32", "of products and activations (tf32: CUDA); sums and losses are in fp32", choices=PRECISIONS
    )
    cuda_graph: str = setting("auto", "replay training steps as a CUDA graph; auto: where one can be", choices=GRAPHS)
    deterministic: bool = setting(False, "bit-equal results from run to run on one machine, at some cost")

    optim: str = setting("SGD", "optimiser: a class of torch.optim")
    lr: float = setting(1e-3, "initial learning rate")
    clip: float = setting(0.0, "gradient-norm clip; 0: none")
    wdecay: float = setting(0.0, "weight decay, inside the optimiser")
    epochs: int = setting(1, "epochs to train in all")
    max_steps: int = setting(0, "stop after so many updates in all; 0: no limit")
    max_eval_tokens: int = setting(0, "score only so many tokens of each split (marks the result partial); 0: all")
    batch_size: int = setting(16, "rows of a training batch")
    eval_batch_size: int = setting(10, "rows for validation and test")
    momentum: float = setting(0.0, "of the optimiser, if it has one")
    ema: float = setting(0.0, "score and save an average of the weights that keeps this share per update; 0: none")
    label_smoothing: float = setting(0.0, "in training, share of the target spread evenly over all classes")
    schedule: str = setting(
        "step", "learning rate: by the rules below, or over the whole run (momentum is left alone)", choices=SCHEDULES
    )
    warmup: int = setting(0, "updates in which the learning rate first rises; 0: none, with onecycle 30 % of all")
    when: list[int] = setting([-1], "divide the learning rate by 10 after these epochs")
    decay: float = setting(1.0, "divide the learning rate by this after every epoch from --decay_from on")
    decay_from: int = setting(1, "see --decay")
    anneal: int = setting(0, "plateau patience in epochs; 0: no annealing on plateaus")
    skip_bad_steps: int = setting(0, "go on after up to so many steps whose loss or gradient is not finite")
    accumulate: int = setting(1, "compute every batch in so many slices of its rows, one update for all")
    checkpoint_minutes: float = setting(10.0, "write last.pt also within an epoch, every so many minutes; 0: never")
    checkpoint_steps: int = setting(0, "and after every so many updates; 0: never")
    tensorboard: bool = setting(False, "write the numbers of metrics.jsonl for TensorBoard too")
    log_interval: int = setting(100, "batches between log lines", flag="--log-interval")

    @classmethod
    def program(cls) -> str:
        """The program's path in the project."""
        return f"{cls.task}/train.py"

    @classmethod
    def preset_names(cls) -> list[str]:
        """What `--preset` may be."""
        return list(cls.presets)

    @classmethod
    def preset_of(cls, given: dict[str, Any]) -> str:
        """The preset that given settings start from."""
        return given.get("preset", "default")

    def validate(self) -> None:
        """Raise UserError at the first setting that makes no sense, naming its flag."""
        if self.load:
            raise UserError(
                f"--load {self.load}: a pickled whole model can run any code when it is opened, so it is refused; save "
                "its weights with torch.save(model.state_dict(), FILE) where it was made and pass --load_weight FILE"
            )
        for name, value in dataclasses.asdict(self).items():
            numbers = value if isinstance(value, list) else [value]
            for number in numbers:
                if isinstance(number, float) and not math.isfinite(number):
                    raise UserError(f"{flag_of(self, name)}: expected a finite number, got {number}")
                if isinstance(number, float) and abs(number) > LARGEST and name not in self.process:
                    raise UserError(f"{flag_of(self, name)}: expected at most {LARGEST:.2g} in size, got {number}")
            if name != "seed" and any(isinstance(n, int) and abs(n) >= 2**31 for n in numbers):
                raise UserError(f"{flag_of(self, name)}: expected less than 2**31, got {max(numbers, key=abs)}")
        self.check_at_least(1, "epochs", "batch_size", "eval_batch_size", "log_interval", "accumulate")
        self.check_at_least(0, "checkpoint_minutes", "checkpoint_steps", "skip_bad_steps")
        if self.accumulate > self.batch_size:
            raise UserError(f"--accumulate {self.accumulate}: more slices than the --batch_size {self.batch_size} rows")
        self.check_at_least(0, "lr", "clip", "wdecay", "max_steps", "max_eval_tokens", "anneal", "threads", "seed")
        self.check_at_least(1, "decay", "decay_from")
        self.check_at_most(MOST_THREADS, "threads")
        self.check_rates("momentum")
        self.check_at_least(0, "warmup")
        for name in ("ema", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name}: expected a share in [0, 1), got {getattr(self, name)}")
        if self.schedule != "step":
            for name in [f.name for f in dataclasses.fields(self) if f.name in self.stepwise]:
                if getattr(self, name) != self.preset_value(name):
                    raise UserError(
                        f"{flag_of(self, name)}: is a rule of --schedule step, without effect on {self.schedule}; "
                        "leave one of the two out"
                    )
        if self.schedule == "onecycle" and self.warmup == 1:
            raise UserError("--warmup 1: with --schedule onecycle expected 0 or at least 2 updates")
        if self.seed >= 2**63:
            raise UserError(f"--seed: expected less than 2**63, got {self.seed}")
        if self.eval and self.resume:
            raise UserError("--eval and --resume exclude each other: to score a run pass --load_weight RUN/weights.pkl")
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other: one continues a run, the other deletes it")

    def preset_value(self, name: str) -> Any:
        """A setting as it is without flags and --config."""
        field = next(f for f in dataclasses.fields(self) if f.name == name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        return self.presets[self.preset].get(name, default)

    def fixed(self, name: str) -> str:
        """Why a continuation of this run must keep a setting; empty if it need not."""
        if self.schedule != "step" and name in ("epochs", "max_steps"):
            return f"--schedule {self.schedule} spreads the learning rate over all updates of the run"
        return "" if name in self.resumable else "a continued run keeps its settings"

    def check_at_least(self, least: float, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise UserError(f"{flag_of(self, name)}: expected at least {least}, got {getattr(self, name)}")

    def check_at_most(self, most: float, *names: str) -> None:
        for name in names:
            if getattr(self, name) > most:
                raise UserError(f"{flag_of(self, name)}: expected at most {most:,}, got {getattr(self, name):,}")

    def check_rates(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{flag_of(self, name)}: expected a probability in [0, 1), got {getattr(self, name)}")

    def torch_device(self) -> torch.device:
        """The device to run on.

        Raises:
            UserError: no such device here.
        """
        wanted = self.device
        if wanted == "auto":
            wanted = "cuda" if self.cuda and torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(wanted)
            torch.empty(1, device=device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as e:
            raise UserError(f"--device {wanted}: not usable here ({str(e).splitlines()[0]}); try --device cpu") from e
        return device

    def notices(self, device: torch.device) -> list[str]:
        """What the user should know of the choices that were made for this device."""
        reason = self.no_graph(device) if device.type == "cuda" and not self.eval else ""
        return [f"no CUDA graph: {reason}"] if reason else []

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which models and losses are computed, for `precision`."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @contextlib.contextmanager
    def float32_products(self) -> Iterator[None]:
        """While it lasts, products of numbers in single precision are just that on CUDA, or in TF32 if `precision` is.

        Left alone, torch takes TF32 for convolutions and not for other products.
        """

        def choose(products: str, convolutions: bool) -> tuple[str, bool]:
            """Returns what was chosen before."""
            with warnings.catch_warnings():  # some versions announce names that older ones do not have
                warnings.filterwarnings("ignore", "Please use the new API")
                before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
                torch.set_float32_matmul_precision(products)
                torch.backends.cudnn.allow_tf32 = convolutions
            return before

        tf32 = self.precision == "tf32"
        before = choose("high" if tf32 else "highest", tf32)
        try:
            yield
        finally:
            choose(*before)

    def chosen(self, device: torch.device) -> Self:
        """These settings with everything that was left to the machine decided.

        Raises:
            UserError: what was asked for cannot run here.
        """
        if self.precision == "tf32" and device.type != "cuda" and not self.resume:  # a run may go on elsewhere
            raise UserError(f"--precision tf32: is of CUDA devices, and this is {device.type}; pass fp32 or bf16")
        reason = self.no_graph(device)
        if self.cuda_graph == "on" and reason and not self.resume:
            raise UserError(f"--cuda_graph on: {reason}; pass auto or off")
        cuda_graph = "off" if reason else {"auto": "on"}.get(self.cuda_graph, self.cuda_graph)
        return dataclasses.replace(self, threads=torch.get_num_threads(), cuda_graph=cuda_graph)

    def no_graph(self, device: torch.device) -> str:
        """Why a training step cannot be a CUDA graph; empty if it can."""
        if device.type != "cuda":
            return f"is of CUDA devices, and this is {device.type}"
        several = torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
        return "processes that train together exchange gradients within a step" if several else ""

    def recipe(self) -> dict[str, Any]:
        """Settings of training that a score is reported with, by name."""
        return {name: getattr(self, name) for name in ("schedule", "warmup", "ema", "label_smoothing")}

    def marks(self) -> dict[str, bool]:
        """What every score of weights that were loaded and not trained further is marked with."""
        return {}

    def load_options(self) -> dict[str, Any]:
        """Further arguments for `weights.load_weights`."""
        return {}

    @contextlib.contextmanager
    def in_flags(self) -> Iterator[None]:
        """Where the library names arguments to pass, name the flags that stand for them."""
        try:
            yield
        except ArgumentError as e:
            known = {field.name for field in dataclasses.fields(self)}
            if not known.issuperset(self.settings_of(e.arguments)):
                raise UserError(f"{e.line}, which no flag of {self.task} does") from e
            raise UserError(e.advise(self.flags(e.arguments))) from e

    def flags(self, arguments: dict[str, Any]) -> str:
        """Flags for arguments of the library, `...` being a value that only the user knows."""
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
        """The settings that stand for arguments of the library."""
        found = dict(arguments)
        return found | dict.fromkeys(self.data_settings, found.pop("data")) if "data" in found else found

    def folder(self) -> Path:
        """The run folder: what the user typed, or runs/<task>/<name> in the project."""
        return Path(self.out) if self.out else PROJECT / "runs" / self.task / self.name

    def data_folder(self) -> str:
        """Where the data are: "synthetic", what the user typed, or the default folder in the project."""
        return self.data or str(PROJECT / self.default_data)


Config = TypeVar("Config", bound=RunConfig)


def flag_of(config: type[RunConfig] | RunConfig, name: str) -> str:
    """The flag of a setting, e.g. `--log-interval`."""
    field = next(f for f in dataclasses.fields(config) if f.name == name)
    return field.metadata["flag"] or f"--{name}"


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return "; did you mean X?" with the name that resembles `word` and those that contain it, or "" if none does."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), names, n=1, cutoff=cutoff)
    if word.lower() not in names and len(word) >= 3:
        near += [name for name in names if word.lower() in name and name not in near]
    return f"; did you mean {' or '.join(names[name] for name in near)}?" if near else ""


class Parser(argparse.ArgumentParser):
    """Complain in one line instead of a usage dump, and name the nearest flag or choice."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see --help")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        args = sys.argv[1:] if args is None else list(args)
        switches = {flag: action for action in self._actions if action.nargs == 0 for flag in action.option_strings}
        if any(not action.option_strings for action in self._actions):  # what follows a flag may be one of those
            switches = {}
        for argument, following in itertools.zip_longest(args, args[1:], fillvalue=""):
            flag, given, value = argument.partition("=")
            value = value if given else following
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


_READERS = {int: whole_number, list[int]: whole_number}


def build_parser(cls: type[RunConfig]) -> argparse.ArgumentParser:
    """A parser with one flag a setting; what is not given on the command line is not in its result."""
    hints = typing.get_type_hints(cls)
    parser = Parser(
        prog=cls.program(),
        description=f"{cls.__doc__} Presets: {', '.join(cls.presets)}.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for field in dataclasses.fields(cls):
        flag, kind = field.metadata["flag"] or f"--{field.name}", hints[field.name]
        names = [flag, f"--{field.name}"] if flag != f"--{field.name}" else [flag]
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        value = field.default_factory() if callable(field.default_factory) else field.default
        value = " ".join(map(str, value)) if isinstance(value, list) else value
        options["help"] = field.metadata["help"].replace("%", "%%") + (f" (default: {value})" if value != "" else "")
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.name == "resume":
            options |= {"nargs": "?", "const": RUN_FOLDER, "metavar": "FILE"}
        elif field.name == "preset":
            options["choices"] = cls.preset_names()
        elif isinstance(kind, types.GenericAlias):
            options |= {"nargs": "+", "type": _READERS.get(kind, float), "metavar": "N"}
        else:
            options |= {"type": _READERS.get(kind, kind), "choices": field.metadata["choices"]}
            options["metavar"] = None if field.metadata["choices"] else kind.__name__.upper()
        parser.add_argument(*names, **options)
    return parser


def parse(cls: type[Config], argv: Sequence[str]) -> tuple[Config, dict[str, Any]]:
    """Settings from a command line.

    Returns:
        the settings, validated; and those that were given as flags or in the `--config` file.

    Raises:
        UserError: an unknown flag or a value that makes no sense.
    """
    parser = build_parser(cls)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        near = did_you_mean(unknown[0].split("=")[0], flags, cutoff=0.8)
        raise UserError(f"unknown argument {unknown[0]}{near or '; --help lists the flags'}")
    flags = vars(namespace)
    given = {**(read_config_file(cls, flags["config"]) if "config" in flags else {}), **flags}
    if "preset" in given:
        given["preset"] = cls.preset_of(given)
    return from_settings(cls, given), given


def from_settings(cls: type[Config], given: dict[str, Any]) -> Config:
    """`given` over the preset it names (or `default`) over the defaults of `cls`, validated."""
    preset = cls.preset_of(given)
    if preset not in cls.presets:
        near = did_you_mean(str(preset), cls.presets)
        raise UserError(f"--preset: expected one of {', '.join(cls.presets)}, got {shown(repr(preset), NAME)}{near}")
    config = cls(**{**cls.presets[preset], **given, "preset": preset})
    config.validate()
    return config


def read_config_file(cls: type[RunConfig], path: str) -> dict[str, Any]:
    """Settings from a JSON object; the config.json of a run, for which its folder may be named, is one.

    Raises:
        UserError: unreadable, no JSON object, an unknown setting or a value of another type.
    """
    if os.path.isdir(path):
        folder, path = path, os.path.join(path, "config.json")
        if not os.path.isfile(path):
            raise UserError(f"--config {folder}: the folder holds no config.json; name a run's folder or a JSON file")
    try:
        content = json.loads(serialization.read_regular(path))
    except OSError as e:
        raise UserError(f"--config {path}: cannot be read ({e.strerror})") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"--config {path}: not JSON ({e})") from e
    task = None
    if isinstance(content, dict):
        task, content = content.get("task"), content.get("settings", content)
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected a JSON object of settings")
    if task not in (None, cls.task):
        raise UserError(
            f"--config {path}: is of {shown(task, NAME)}, not of {cls.task}; name the file of a run of this task"
        )
    return check_settings(cls, content, f"--config {path}")


def check_settings(cls: type[RunConfig], content: dict[str, Any], where: str) -> dict[str, Any]:
    """`content` with every name known and every value of its setting's type, or UserError."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    checked = {}
    for name, value in content.items():
        if name not in fields:
            raise UserError(f"{where}: unknown setting {shown(repr(name), NAME)}{did_you_mean(str(name), fields)}")
        if name in cls.process:
            raise UserError(f"{where}: {name} says what to do now; give it on the command line")
        kind = hints[name]
        plain = list if isinstance(kind, types.GenericAlias) else kind
        if plain is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
            value = float(value)
        elif plain is int:
            value = _whole(value)
        elif kind == list[int] and isinstance(value, list):
            value = [_whole(number) for number in value]
        choices = fields[name].metadata["choices"]
        if choices and value not in choices:
            near = did_you_mean(str(value), choices)
            raise UserError(
                f"{where}: {name} expects one of {', '.join(choices)}, got {shown(repr(value), NAME)}{near}"
            )
        fits = isinstance(value, plain) and (plain is bool or not isinstance(value, bool))
        if plain is list:
            fits = fits and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        if plain is str:  # most are parts of file names
            fits = fits and _is_text_of_system(value)
        if not fits:
            raise UserError(f"{where}: {name} expects {plain.__name__}, got {shown(repr(value), NAME)}")
        checked[name] = value
    return checked


def _whole(value: Any) -> Any:
    """Turn a float without a fraction into an int; leave everything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_text_of_system(text: str) -> bool:
    """Whether the text could be an argument of a command; JSON can hold zero bytes and lone surrogates."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def to_settings(config: RunConfig) -> dict[str, Any]:
    """The settings of a run as plain values, for JSON and checkpoints: all but those about this process only."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in config.process}
