"""All flags of the tasks' train.py as tables, from the settings themselves."""

import dataclasses
from collections.abc import Collection, Mapping

from scripts.reports.markdown import table
from trellisnet.training import programs
from trellisnet.training.classification import ClassificationConfig
from trellisnet.training.config import default_text
from trellisnet.training.settings import GROUPS, Setting, flag_of, properties_of

CONFIGS = {task: programs.get(task).config_class for task in programs.TASKS}
IMAGES = [task for task, config in CONFIGS.items() if issubclass(config, ClassificationConfig)]
KINDS = {"texts": [task for task in CONFIGS if task not in IMAGES], "images": IMAGES}
# What help texts insert.
PLACEHOLDERS = {"task": "TASK", "default_data": "data/…"}


def flags() -> list[str]:
    """A heading and a table for each group of `--help`; † marks what a resumed run may change."""
    settings: dict[str, dict[str, dataclasses.Field]] = {}
    for task, config in CONFIGS.items():
        for field in dataclasses.fields(config):
            settings.setdefault(field.name, {})[task] = field
    rows: dict[str, list[tuple[str, ...]]] = {group: [] for group in GROUPS}
    for name, fields in settings.items():
        properties = {task: properties_of(CONFIGS[task], name) for task in fields}
        task, first = next(iter(properties.items()))
        if first.hidden:
            continue
        flag = flag_of(CONFIGS[task], name)
        switch = f", `--no-{flag[2:]}`" if isinstance(fields[task].default, bool) else ""
        scope = f" ({named(fields)})" if len(fields) < len(CONFIGS) else ""
        meaning = by_task({task: described(each) for task, each in properties.items()})
        default = "" if "default:" in meaning else by_task({task: default_text(each) for task, each in fields.items()})
        mark = " †" if first.resumable else ""
        rows[first.group].append((f"`{flag}`{switch}{scope}{mark}", meaning, default))
    lines = []
    for group in GROUPS:
        lines += [f"### {group.capitalize()}", "", *table(["flag", "meaning", "default"], rows[group]), ""]
    return lines[:-1]


def described(setting: Setting) -> str:
    """The help of a setting, with its choices."""
    choices = f" ({', '.join(setting.choices)})" if setting.choices else ""
    return setting.help.format(**PLACEHOLDERS) + choices


def by_task(texts: Mapping[str, str]) -> str:
    """Texts, each with the tasks that it belongs to; a single one stands alone."""
    tasks: dict[str, list[str]] = {}
    for task, text in texts.items():
        tasks.setdefault(text, []).append(task)
    if len(tasks) == 1:
        return next(iter(tasks))
    return "; ".join(f"{text} ({named(owners)})" for text, owners in tasks.items())


def named(tasks: Collection[str]) -> str:
    """Names of tasks; all tasks on texts or on images go by one name."""
    names = []
    for kind, members in KINDS.items():
        names += [kind] if set(members) <= set(tasks) else [task for task in members if task in tasks]
    return ", ".join(names)
