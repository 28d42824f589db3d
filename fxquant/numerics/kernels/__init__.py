"""onnxruntime's integer kernels on x64, bit for bit: pure functions on int64 codes.

f() rounds to float32, rint rounds half to even. The formulas were measured on onnxruntime 1.31.1 (no code of the counts
that each function's docstring gives differed). They are the arbiter: what else computes codes is compared with them.
"""
