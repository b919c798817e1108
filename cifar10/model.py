"""Settings and model of sequential CIFAR-10. Defaults are those of the authors' released script, but not permuted."""

from dataclasses import dataclass
from typing import ClassVar

from cifar10.data import MEAN, STD
from trellisnet.data.augmentation import AffineMaps
from trellisnet.training.classification import PRESETS, ClassificationConfig, build_model

__all__ = ["Config", "build_model"]


@dataclass(kw_only=True)
class Config(ClassificationConfig):
    """Train a TrellisNet on CIFAR-10, pixel by pixel."""

    task: ClassVar[str] = "cifar10"
    default_data: ClassVar[str] = "data/cifar10"
    mean: ClassVar = MEAN
    std: ClassVar = STD
    augmentation: ClassVar = AffineMaps(shift=4, whole_pixels=True, mirror=True)
    presets: ClassVar = {
        **PRESETS,
        "best": {**PRESETS["best"], "augment": True},
        "gpu": {**PRESETS["gpu"], "augment": True},
        # For two CPU cores.
        "small": {
            "name": "small", "dropout": 0.0, "dropouti": 0.0, "dropouth": 0.1, "wdrop": 0.0, "epochs": 4,
            "when": [3],
        },
    }  # fmt: skip

    defaults: ClassVar = {"name": "Trellis_seqMNIST_CIFAR", "permute": False}
    helps: ClassVar = {
        "data": "folder with the six batches (binary version), or 'synthetic'; default: {default_data} in the project"
    }
