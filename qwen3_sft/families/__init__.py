"""One file per family of models: what it is called, how large it is, what it can do here.

What patches must know of its modules is `monkey_patch/architectures.py`.
"""
