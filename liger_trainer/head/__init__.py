"""The fused loss inside lm_head: hooks, the form of a model's head, evaluation logits."""
