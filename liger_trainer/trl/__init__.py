"""The bridge behind TRL's fused heads."""
