"""From a command line to processes: GPUs, nodes, accelerate's launcher, exit codes.

What one process then does is `train.py` and `run.py`, one folder up.
"""
