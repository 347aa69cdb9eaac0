"""The one Trainer and its parts: steps, metrics, memory, signals, evaluation, callbacks.

What a checkpoint is lives in `checkpoints/`; putting a run together in `build.py`.
"""
