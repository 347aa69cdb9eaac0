"""The run folder and what is written into it: options, environment, one line per step.

What the lines hold is computed in `training/`.
"""
