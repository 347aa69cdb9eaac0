"""The loss of rows of logits and its gradient in their place, as one Triton kernel.

`rows.py` holds the kernel and describes its launch.
"""
