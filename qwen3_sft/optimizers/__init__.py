"""Which optimizers there are, and those of our own: within the backward pass, in slices, low-bit.

What they cost is computed in `plan/`.
"""
