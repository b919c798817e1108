import hashlib
import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent
OPS = HERE / "trellisnet" / "ops"
SOURCES = ("common.h", "gates.c", "gates.h", "product.c")
# As trellisnet/ops/compiled.py has it, so that a library built from another version of its source is not used.
FINGERPRINT = hashlib.sha256(b"".join((OPS / name).read_bytes() for name in SOURCES)).hexdigest()[:16]

setup(
    name="trellisnet",
    version=re.search(r'__version__ = "(.+)"', (HERE / "trellisnet" / "__init__.py").read_text()).group(1),
    description="Trellis Networks for sequence modelling (Bai, Kolter & Koltun, ICLR 2019)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["trellisnet", "trellisnet.*"]),
    # Makes an editable install a plain path. The task folders are importable through it, and so is the package from
    # the folder that holds a checkout named trellisnet, which an import hook would come too late for.
    package_dir={"": "."},
    package_data={"trellisnet": ["py.typed", *(f"ops/{name}" for name in SOURCES)]},
    # An extra that nobody needs: without a compiler the installation goes on, and torch's operations do the same.
    ext_modules=[
        Extension(
            "trellisnet.ops._compiled",
            sources=[f"trellisnet/ops/{name}" for name in SOURCES if name.endswith(".c")],
            depends=[f"trellisnet/ops/{name}" for name in SOURCES],
            define_macros=[("SOURCE", f'"{FINGERPRINT}"')],
            extra_compile_args=["-O3", "-std=c11", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ],
    python_requires=">=3.11",
    install_requires=["torch>=2.6", "numpy>=1.26", "tqdm>=4.60"],
    extras_require={
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "ruff>=0.9",
            "tensorboard>=2.14",
            "hypothesis>=6.100",
            "setuptools>=64",
        ],
        "notebook": ["ipykernel>=6", "matplotlib>=3.7", "nbclient>=0.8"],
        "onnx": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.3"],
        "plot": ["matplotlib>=3.7"],
        "safetensors": ["safetensors>=0.4"],
        "tensorboard": ["tensorboard>=2.14"],
        "triton": ["triton>=3"],
    },
)
