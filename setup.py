import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
TASKS = ["word_ptb", "char_ptb", "wt103", "pmnist", "cifar10"]

setup(
    name="trellisnet",
    version=re.search(r'__version__ = "(.+)"', (HERE / "trellisnet" / "__init__.py").read_text()).group(1),
    description="Trellis Networks for sequence modelling (Bai, Kolter & Koltun, ICLR 2019)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["trellisnet", "trellisnet.*", *TASKS]),
    package_data={"trellisnet": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=["torch>=2.6", "numpy>=1.26", "tqdm>=4.60"],
    extras_require={
        "dev": ["pytest>=8", "ruff>=0.9", "tensorboard>=2.14", "hypothesis>=6.100"],
        "tensorboard": ["tensorboard>=2.14"],
    },
)
