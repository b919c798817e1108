"""Data: from files to tensors of ids. Nothing here knows a model or a device."""
