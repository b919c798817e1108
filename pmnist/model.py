"""Settings and model of sequential and permuted MNIST. Defaults are those of the authors' released script."""

from dataclasses import dataclass
from typing import ClassVar

from pmnist.data import MEAN, STD
from trellisnet.data.augmentation import AffineMaps
from trellisnet.training.classification import PRESETS, ClassificationConfig, build_model

__all__ = ["Config", "build_model"]


@dataclass(kw_only=True)
class Config(ClassificationConfig):
    """Train a TrellisNet on MNIST, pixel by pixel, permuted or not."""

    task: ClassVar[str] = "pmnist"
    default_data: ClassVar[str] = "data/mnist"
    mean: ClassVar = MEAN
    std: ClassVar = STD
    augmentation: ClassVar = AffineMaps(shift=2, rotation=10, scale=0.1)
    presets: ClassVar = {
        **PRESETS,
        # For two CPU cores: the authors' model and a few of their 200 epochs, little regularised.
        "small": {
            "name": "small", "dropout": 0.0, "dropouti": 0.0, "dropouth": 0.05, "wdrop": 0.0, "epochs": 4,
            "when": [3],
        },
    }  # fmt: skip

    defaults: ClassVar = {"name": "Trellis_seqMNIST_CIFAR"}
    helps: ClassVar = {"data": "folder with the four IDX files, or 'synthetic'; default: {default_data} in the project"}
