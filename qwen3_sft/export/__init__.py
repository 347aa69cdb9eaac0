"""A model in hub layout, written one tensor at a time and proved before it gets its name.

Checkpoints to go on from are `checkpoints/`.
"""
