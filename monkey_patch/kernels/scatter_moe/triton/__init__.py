"""The stages of the mixture-of-experts block as Triton kernels, one stage per file.

What they compute is defined by `plain.py`, one folder up; the stages in FP8 are `fp8/`.
"""
