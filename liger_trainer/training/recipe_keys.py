"""The keys of a recipe for people: ``liger-trainer train --help``."""

import textwrap
from dataclasses import MISSING, fields
from typing import Any

from .recipe import argument_classes

USAGE = "liger-trainer train RECIPE.yaml [--key value ...]"
INDENT = " " * 4


def keys_text(trainer: str = "trainer") -> str:
    """Usage, and each key with its default and the first sentence of its description, by the class that has it."""
    lines = [
        f"usage: {USAGE}",
        "",
        "Train by a recipe in this process; for several GPUs use `accelerate launch`. Each key below may stand in the",
        f"recipe or on the command line. These are the keys with trainer: {trainer}.",
    ]
    for cls in argument_classes(trainer):
        lines += ["", f"{cls.__name__}:"]
        for field in fields(cls):
            if field.init:
                default: Any = None if field.default is MISSING else field.default
                text = str(field.metadata.get("help", "")).split(". ")[0].rstrip(".")
                head = f"  --{field.name}" + ("" if default is None else f" (default: {default})")
                lines += [
                    head,
                    *textwrap.wrap(text, 120, initial_indent=INDENT, subsequent_indent=INDENT),
                ]
    return "\n".join(lines)
