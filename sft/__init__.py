"""Supervised fine-tuning that is right, predictable and fast (docs/DESIGN.md)."""
