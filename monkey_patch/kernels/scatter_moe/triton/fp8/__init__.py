"""The stages in FP8 as Triton kernels: operands quantised to e4m3, products accumulated in float32.

`scatter_moe/quantize.py` defines scales and values bit for bit, `plain_fp8.py` what each stage
computes; the kernels here are the same with the quantisation where the values are in registers.
"""
