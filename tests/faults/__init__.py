"""Faults inflicted on real runs and files; scripts/torture.py starts them."""
