"""Settings: dataclass fields that carry their own properties as flags, in files and on resume."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from trellisnet.errors import UserError

LARGEST = torch.finfo(torch.float32).max  # settings enter single-precision arithmetic
# Headings of --help, in this order.
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
        help: text for `--help`, where {task} and {default_data} are replaced by those of the task.
        group: heading in `--help`, one of `GROUPS`.
        flag: spelling of the flag if it is not `--` and the name of the field.
        choices: allowed texts; None for any.
        at_least: lower bound; for a list, of every number, and the list must not be empty.
        at_most: upper bound.
        above: exclusive lower bound.
        special: value outside the bounds that is allowed and stands for a default.
        word: spelling of `special` on the command line and in files, such as auto.
        metavar: name of a value in `--help`; empty for that of its type.
        rate: noun for a number in [0, 1), for the error message; empty for any other number.
        bits: an integer must be below 2**bits in size.
        needs: settings of which at least one must be on for this one to have an effect.
        step_rule: rule of `--schedule step`, without effect on other schedules.
        process: instruction to this process, such as `--eval`: command line only, not stored with the run.
        resumable: may change when a run is resumed.
        hidden: not listed by `--help`.
    """

    help: str
    group: str
    flag: str = ""
    choices: Sequence[str] | None = None
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    special: float | list | None = None
    word: str = ""
    metavar: str = ""
    rate: str = ""
    bits: int = 31
    needs: Sequence[str] = ()
    step_rule: bool = False
    process: bool = False
    resumable: bool = False
    hidden: bool = False

    @property
    def may_change(self) -> bool:
        """True if the value may change when a run is resumed."""
        return self.process or self.resumable

    def problem(self, value: Any) -> str:
        """Say what is wrong with a value; empty if nothing is."""
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                return f"expected a finite number, got {number}"
            if isinstance(number, float) and abs(number) > LARGEST and not self.process:
                return f"expected at most {LARGEST:.2g} in size, got {number}"
            if isinstance(number, int) and abs(number) >= 2**self.bits:
                return f"expected less than 2**{self.bits}, got {number}"
        if value == self.special:
            return ""
        if isinstance(value, list):
            if self.at_least is not None and min(value, default=-math.inf) < self.at_least:
                return f"expected integers ≥ {self.at_least}, got {value}"
            if self.at_most is not None and max(value, default=0) > self.at_most:
                return f"expected integers ≤ {self.at_most:,}, got {value}"
            return ""
        if self.rate and not 0 <= value < 1:
            return f"expected a {self.rate} in [0, 1), got {value}"
        if self.at_least is not None and value < self.at_least:
            special = "" if self.special is None else f", or {self.word or f'{self.special:g} for the default'}"
            return f"expected at least {self.at_least}{special}, got {value}"
        if self.above is not None and not self.above < value <= (self.at_most or math.inf):
            most = "" if self.at_most is None else f" and at most {self.at_most}"
            return f"expected more than {self.above}{most}, got {value}"
        if self.at_most is not None and value > self.at_most:
            return f"expected at most {self.at_most:,}, got {value:,}"
        return ""


def setting(default: Any, help: str, **properties: Any) -> Any:
    """Declare a dataclass field that is also a flag, with the properties of :class:`Setting`."""
    return _field(default, Setting(help=help, **properties))


def _field(default: Any, properties: Setting) -> Any:
    metadata = {"setting": properties}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Settings:
    """Base class of configurations.

    Class attributes:
        defaults, helps: tables by which a subclass changes defaults and help texts of inherited settings.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    helps: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        """Redeclare the fields in the tables, before `dataclass` collects them."""
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
        """Check all settings.

        Raises:
            UserError: a value is out of range or has no effect; the message names its flag.
        """
        for field in dataclasses.fields(self):
            value, properties = getattr(self, field.name), properties_of(self, field.name)
            if problem := properties.problem(value):
                raise UserError(f"{flag_of(self, field.name)}: {problem}")
            needs = [flag_of(self, name) for name in properties.needs]
            if needs and value != default_of(field) and not any(getattr(self, name) for name in properties.needs):
                raise UserError(f"{flag_of(self, field.name)}: has no effect without {' or '.join(needs)}")


def properties_of(config: type[Settings] | Settings, name: str) -> Setting:
    """Return the properties of a setting."""
    return config.__dataclass_fields__[name].metadata["setting"]


def flag_of(config: type[Settings] | Settings, name: str) -> str:
    """Return the flag of a setting, such as `--log-interval`."""
    return properties_of(config, name).flag or f"--{name}"


def default_of(field: dataclasses.Field) -> Any:
    """Return the default of a field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
