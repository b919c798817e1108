"""Data: from files to tensors of ids. Nothing here knows a model or a device."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]  # relative defaults (data, runs) lie here
