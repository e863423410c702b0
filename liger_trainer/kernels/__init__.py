"""Bridge to the repository's top-level ``kernels/`` folder; an installed package has the files here instead."""

from pathlib import Path

__path__.append(str(Path(__file__).parents[2] / "kernels"))
