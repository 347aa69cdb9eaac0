"""The stages of the mixture-of-experts block as Triton kernels, one stage per file."""
