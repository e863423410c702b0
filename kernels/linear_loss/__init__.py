"""What the vocabulary losses are made of: token chunks, vocabulary chunks, row kernels, gradient sums."""
