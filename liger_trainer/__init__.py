"""Triton kernels for LLM training as a Hugging Face Trainer plugin."""
