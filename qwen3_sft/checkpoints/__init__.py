"""Checkpoints of a run: written, hashed, sealed, verified, rotated and read again, on every engine.

What the Trainer does around a save lives in `training/`; a model for others to load in `export/`.
"""
