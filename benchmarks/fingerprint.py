"""A hash of all that decides what a round of the training benchmark measures.

It is made from files: the benchmark also runs in trees without git. Imports no torch.

Python sources count without comments, docstrings, help texts (a field's ``metadata``) and layout. How they are parsed
depends on the version of Python, so that is a part of the hash, too.
"""

import ast
import hashlib
import json
import os
import sys
from functools import cache
from pathlib import Path

import yaml

from benchmarks.common import ROOT
from benchmarks.train_arms import ARMS

PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate")  # in every run; TRL has the recipes' ModelConfig
DISTRIBUTIONS = {"liger_kernel": "liger-kernel"}  # where the name of the package to install is another
# What reads the recipe, builds the Trainer and takes the numbers, in every arm; names: these definitions alone.
IN_EVERY_ARM = {
    "liger_trainer/recipe.py": (),
    "liger_trainer/synthetic.py": (),
    "liger_trainer/train.py": ("model_config", "build_dataset", "build_tokenizer", "build_model", "build_trainer"),
    "benchmarks/train_arms.py": (),
    "benchmarks/train_worker.py": ("overrides_of", "train", "over_ranks", "shown", "failure"),
    "benchmarks/step_meter.py": (),
}
# What happens before a training process starts, or in another.
BESIDE_TRAINING = {"batch_search", "cli", "fit", "fit_trial"}
MEDUSA = tuple(f"liger_trainer/{name}.py" for name in ("medusa", "medusa_heads", "medusa_loss", "head_probe"))
ENVIRONMENT = ("PYTORCH_", "NCCL_", "CUBLAS_")  # what starts with these decides speed and memory


def fingerprint(job: dict, packages: dict[str, str | None]) -> str:
    """The hash of ``job``, 16 hexadecimal digits.

    Args:
        job: as ``train_rows.plan`` makes it, with ``device`` and ``profile``.
        packages: installed versions, as ``common.describe_software`` gives them.
    """
    arm = ARMS[job["arm"]]
    recipe = yaml.safe_load((ROOT / job["recipe"]).read_text()) | job["overrides"] | arm.overrides
    recipe.pop("output_dir", None)
    launch = yaml.safe_load((ROOT / job["config_file"]).read_text())
    used = [*PACKAGES, *(DISTRIBUTIONS.get(name, name) for name in arm.packages)]
    if launch["distributed_type"] == "DEEPSPEED":
        used.append("deepspeed")
    if recipe.get("use_peft"):
        used.append("peft")
    parts = {
        "recipe": recipe,
        "launch": [launch, job["processes"]],
        "measured": [job[key] for key in ("warmup", "steps", "window", "device", "profile")],
        "arm": job["arm"],
        "python": sys.version_info[:2],
        "environment": {name: v for name, v in os.environ.items() if name.startswith(ENVIRONMENT)} | job["environment"],
        "packages": {name: packages.get(name) for name in used},
        "sources": {path: _source(ROOT / path, names) for path, names in IN_EVERY_ARM.items()},
    }
    if recipe.get("medusa_heads"):
        parts["medusa"] = [_source(ROOT / path) for path in MEDUSA]
    if recipe.get("use_liger"):
        parts["ours"] = our_sources()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@cache
def our_sources() -> str:
    """A hash of the sources in ``kernels`` and ``liger_trainer`` that a training process runs."""
    files = sorted(path for folder in ("kernels", "liger_trainer") for path in (ROOT / folder).rglob("*.py"))
    files = [path for path in files if path.stem not in BESIDE_TRAINING]
    content = [(str(path.relative_to(ROOT)), _source(path)) for path in files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@cache
def _source(path: Path, names: tuple[str, ...] = ()) -> str:
    """A file's normal form, or that of its definitions ``names``."""
    return _normal(path.read_text(encoding="utf-8"), names)


def _normal(text: str, names: tuple[str, ...] = ()) -> str:
    tree = ast.parse(text)
    if names:
        found = {getattr(node, "name", None): node for node in tree.body}
        tree.body = [found[name] for name in names]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            del node.body[0]
        elif isinstance(node, ast.Call):
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "metadata"]
    return ast.dump(tree)
