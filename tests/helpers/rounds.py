"""Rounds of the training benchmark with made-up numbers."""

GOOD = {
    "status": "ok", "tokens_per_s": 100.0, "padded_tokens_per_s": 120.0, "step_ms": 2.0, "peak_allocated_gib": 20.0,
    "peak_reserved_gib": 22.0, "static_gib": 8.0, "gradients_gib": 2.0, "above_static_gib": 10.0, "first_loss": 5.0,
    "last_loss": 4.0, "first_grad_norm": 2.0, "last_grad_norm": 1.5,
}  # fmt: skip
OOM = {"status": "oom", "note": "no"}
ERROR = {"status": "error", "note": "x"}
