"""The layout's rules, read from the source: who may import whom, how long a file may be, what a wheel contains."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "liger_trainer", "tests", "benchmarks")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).glob("**/*.py"))

# A module imports from its own layer and from those above it in this list. A new module needs a place here.
LAYERS = [
    {"kernels", "config", "errors", "report", "sharding", "verdicts", "environment", "parameter_count", "rebinding"},
    {
        "probing", "norms", "rotary", "attention", "padding", "gated", "rules", "head_probe", "lazy_logits",
        "fused_head", "medusa_loss",
    },
    {"patching"},
    {"arguments", "callbacks", "trl", "auto", "throughput", "checkpoints", "medusa", "medusa_heads"},
    {"failures"},
    {"data", "synthetic", "recipe", "train", "batch_search", "fit", "fit_trial"},
    {"cli"},
]  # fmt: skip
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path):
    """Imported modules of a file, wherever in it: absolute names, and siblings as ``.name``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level and node.module is None:
            found |= {f".{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + node.module)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_kernels_need_only_torch_and_triton(path):
    siblings = {f".{file.stem}" for file in path.parent.glob("*.py")}
    for name in imports(path):
        top = name.split(".")[0]
        assert name in siblings or top in sys.stdlib_module_names | {"torch", "triton"}, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "liger_trainer").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_layers_point_one_way(path):
    assert path.stem in LEVEL, f"{path.name} is in no layer: give it a place in LAYERS"
    for name in imports(path):
        if name.startswith("."):
            sibling = name.split(".")[1]
            assert LEVEL[sibling] <= LEVEL[path.stem], f"{path.name} imports {sibling}, which is a layer further up"
        assert not name.startswith("liger_trainer"), f"{path.name}: imports of the package's own modules are relative"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_packages_are_the_folders():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {str(f.parent.relative_to(ROOT)).replace("/", ".") for f in ROOT.glob("liger_trainer/**/*.py")}
    assert set(setuptools["packages"]) == folders
    assert setuptools["package-dir"] == {"liger_trainer.kernels": "kernels"}
    assert not list((ROOT / "kernels").glob("*/*.py"))
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_is_light_and_leaves_the_name_kernels_alone():
    """HF's `kernels` package must be found, not our folder; heavy imports wait until a name is used."""
    code = (
        "import sys; from importlib.util import find_spec; import liger_trainer; "
        "assert find_spec('kernels') is None or 'site-packages' in find_spec('kernels').origin; "
        "print([name for name in sys.modules if name.split('.')[0] in ('transformers', 'trl', 'triton', 'torch')])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
