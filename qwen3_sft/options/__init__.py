"""Every option, where recipes come from, and what is refused before anything is loaded.

What follows from the options is decided in `decisions.py`.
"""
