"""Benchmarks of the kernels and of whole training steps. Not installed: run from a checkout, see README.md."""
