"""One folder per operation: `reference.py` defines it, `op.py` is the public function.

Beside them lies what launches and compiles kernels. Models and transformers are known only to the
patches, one folder up.
"""
