"""Data: from files to tensors of ids, independent of models and devices."""

from pathlib import Path


def _project(folder: Path) -> Path:
    """Return `folder`, which contains the package, if it is a checkout, else the current working directory.

    An installed package lies in site-packages, where neither data nor runs belong.
    """
    checkout = all((folder / name).is_file() for name in ("setup.py", "word_ptb/train.py"))
    return folder if checkout else Path()


PROJECT = _project(Path(__file__).resolve().parents[2])  # relative defaults (data, runs) lie here
