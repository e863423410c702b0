"""Which layers keep their activations and which recompute them: decided for each batch, by the memory that is free."""
