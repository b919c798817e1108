"""Tasks: each binds a model to its batches, losses and scores. The engine knows only :class:`Task`."""

from trellisnet.training.tasks.base import AccuracyTask, Losses, Progress, Splits, Task, evaluating
from trellisnet.training.tasks.classification import Augmentation, Classification
from trellisnet.training.tasks.language_modeling import LanguageModeling
from trellisnet.training.tasks.variants import CharacterModeling, Reciting
from trellisnet.training.tasks.windows import Windows

__all__ = [
    "AccuracyTask",
    "Augmentation",
    "CharacterModeling",
    "Classification",
    "LanguageModeling",
    "Losses",
    "Progress",
    "Reciting",
    "Splits",
    "Task",
    "Windows",
    "evaluating",
]
