"""Samples assigned to rows, rows made batches, and the proof that documents do not see each other.

Where samples come from is `data/`.
"""
