"""Data: from files to tensors of ids. Nothing here knows a model or a device."""

from pathlib import Path


def _project(folder: Path) -> Path:
    """Return `folder`, which holds the package, if it is a checkout, else the working directory of the moment.

    An installed package lies in site-packages, where neither data nor runs belong.
    """
    checkout = all((folder / name).is_file() for name in ("setup.py", "word_ptb/train.py"))
    return folder if checkout else Path()


PROJECT = _project(Path(__file__).resolve().parents[2])  # relative defaults (data, runs) lie here
