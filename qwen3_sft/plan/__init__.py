"""Memory and speed of a run, computed from options and shapes; no GPU, no weights.

What is measured beside it is `training/plan_check.py`.
"""
