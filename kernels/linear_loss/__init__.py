"""The core of the vocabulary losses: options, chunk loops, row kernels, gradients, and the passes made of them."""
