"""The router's softmax, top-k, statistics and gradient as Triton kernels.

`stages.py` launches them, and says how they add and what that does to the last bits.
"""
