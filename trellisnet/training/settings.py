"""A setting and its properties: what a field of a configuration is, as a flag, in a file and in a continued run."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from trellisnet.errors import UserError

LARGEST = torch.finfo(torch.float32).max  # of a setting that enters single-precision arithmetic
# Of --help, in this order.
GROUPS = (
    "data",
    "model",
    "settings of other cores",
    "regularisation",
    "optimisation",
    "evaluation",
    "run and checkpoints",
    "hardware",
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Properties of a setting.

    Args:
        help: for `--help`; {task} and {default_data} stand for those of the task.
        group: one of `GROUPS`.
        flag: if it is spelled otherwise than the field.
        choices: of a text.
        at_least: lower bound; of a list, of every number, and there has to be one.
        at_most: upper bound.
        above: lower bound that is excluded.
        special: a number that stands for a default, whatever the bounds.
        rate: noun for a number in [0, 1); empty if it need not lie there.
        bits: of the largest whole number.
        needs: settings of which one must be on for this one to have an effect.
        step_rule: is a rule of `--schedule step`, without effect on other schedules.
        process: says what to do now, not what to compute: only on the command line, never kept with a run.
        resumable: may differ between a run and its continuation.
        hidden: is not listed by `--help`.
    """

    help: str
    group: str
    flag: str = ""
    choices: Sequence[str] | None = None
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    special: float | None = None
    rate: str = ""
    bits: int = 31
    needs: Sequence[str] = ()
    step_rule: bool = False
    process: bool = False
    resumable: bool = False
    hidden: bool = False

    @property
    def may_change(self) -> bool:
        """Whether a continuation of a run may have another value."""
        return self.process or self.resumable

    def problem(self, value: Any) -> str:
        """Say what is wrong with a value; "" if nothing is."""
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                return f"expected a finite number, got {number}"
            if isinstance(number, float) and abs(number) > LARGEST and not self.process:
                return f"expected at most {LARGEST:.2g} in size, got {number}"
            if isinstance(number, int) and abs(number) >= 2**self.bits:
                return f"expected less than 2**{self.bits}, got {number}"
        if isinstance(value, list):
            short = self.at_least is not None and min(value, default=-math.inf) < self.at_least
            return f"expected integers ≥ {self.at_least}, got {value}" if short else ""
        if value == self.special:
            return ""
        if self.rate and not 0 <= value < 1:
            return f"expected a {self.rate} in [0, 1), got {value}"
        if self.at_least is not None and value < self.at_least:
            special = "" if self.special is None else f", or {self.special:g} for the default"
            return f"expected at least {self.at_least}{special}, got {value}"
        if self.above is not None and not self.above < value <= (self.at_most or math.inf):
            most = "" if self.at_most is None else f" and at most {self.at_most}"
            return f"expected more than {self.above}{most}, got {value}"
        if self.at_most is not None and value > self.at_most:
            return f"expected at most {self.at_most:,}, got {value:,}"
        return ""


def setting(default: Any, help: str, **properties: Any) -> Any:
    """A dataclass field that is also a flag, with the properties of :class:`Setting`."""
    return _field(default, Setting(help=help, **properties))


def _field(default: Any, properties: Setting) -> Any:
    metadata = {"setting": properties}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Settings:
    """Base of configurations. A subclass may change defaults and help texts of the settings it inherits by tables."""

    defaults: ClassVar[dict[str, Any]] = {}
    helps: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        """Declare what the tables change, before `dataclass` looks for fields."""
        super().__init_subclass__(**options)
        defaults, helps = (cls.__dict__.get(table, {}) for table in ("defaults", "helps"))
        inherited = {field.name: field for field in dataclasses.fields(cls)}
        for name in {**defaults, **helps}:
            field = inherited[name]
            properties = field.metadata["setting"]
            if name in helps:
                properties = dataclasses.replace(properties, help=helps[name])
            cls.__annotations__[name] = field.type
            setattr(cls, name, _field(defaults.get(name, default_of(field)), properties))

    def validate(self) -> None:
        """Raise UserError at the first setting that makes no sense, naming its flag."""
        for field in dataclasses.fields(self):
            value, properties = getattr(self, field.name), properties_of(self, field.name)
            if problem := properties.problem(value):
                raise UserError(f"{flag_of(self, field.name)}: {problem}")
            needs = [flag_of(self, name) for name in properties.needs]
            if needs and value != default_of(field) and not any(getattr(self, name) for name in properties.needs):
                raise UserError(f"{flag_of(self, field.name)}: has no effect without {' or '.join(needs)}")


def properties_of(config: type[Settings] | Settings, name: str) -> Setting:
    """The properties of a setting."""
    return config.__dataclass_fields__[name].metadata["setting"]


def flag_of(config: type[Settings] | Settings, name: str) -> str:
    """The flag of a setting, e.g. `--log-interval`."""
    return properties_of(config, name).flag or f"--{name}"


def default_of(field: dataclasses.Field) -> Any:
    """The default of a field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
