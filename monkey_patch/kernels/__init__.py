"""One folder per operation: reference (plain torch, the definition), triton (kernels), op."""
