"""Counts what runs un-padded."""

import pytest

from liger_trainer.unpadding import stack as stack_file


@pytest.fixture
def totals(monkeypatch):
    """``(tokens that the stack got, real tokens)`` of each batch that ran un-padded; the check's are left out."""
    seen = []
    run_unpadded = stack_file.run_unpadded

    def spy(original, stack, given, layout, positions):
        def counted(*args, **kwargs):
            inputs = kwargs.get("input_ids")
            seen.append(((kwargs["inputs_embeds"] if inputs is None else inputs).shape[1], layout.real))
            return original(*args, **kwargs)

        return run_unpadded(counted, stack, given, layout, positions)

    monkeypatch.setattr(stack_file, "run_unpadded", spy)
    return seen
