"""The layout's rules, read from the source: who may import whom, how long a file may be, what a wheel contains."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import liger_trainer

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "liger_trainer", "tests", "benchmarks")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).glob("**/*.py"))

# A folder (or a file beside the folders) imports from itself and from those above it in this list.
LAYERS = [
    {"kernels", "config", "report", "environment"},
    {"probing", "losses", "nn"},
    {"head"},
    {"unpadding", "memory"},
    {"rules"},
    {"patching"},
    {"trl", "medusa", "auto", "splade"},
    {"callbacks"},
    {"arguments"},
    {"training"},
    {"cli", "train"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PACKAGE_FILES = [file for file in FILES if file.parts[len(ROOT.parts)] in ("kernels", "liger_trainer")]


def module_name(path):
    """The dotted name under which ``path`` is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("liger_trainer", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(path) for path in PACKAGE_FILES}


def imports(path):
    """Absolute names of the modules that a file imports, wherever in it."""
    found = set()
    package = module_name(path) if path.stem == "__init__" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else base for name in names}
    return found


def folder(name):
    """The folder, or file beside the folders, of a module of the package."""
    return ([*name.split("."), ""])[1]


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("**/*.py")), ids=lambda path: path.stem)
def test_kernels_need_only_torch_and_triton(path):
    for name in imports(path):
        own = name == "liger_trainer.kernels" or name.startswith("liger_trainer.kernels.")
        assert own or name.split(".")[0] in sys.stdlib_module_names | {"torch", "triton"}, f"{path} imports {name}"


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=module_name)
def test_folders_point_one_way(path):
    own = folder(module_name(path))
    if not own:  # the package's lazy names
        return
    assert own in LEVEL, f"{path} is in no layer: give its folder a place in LAYERS"
    for name in imports(path):
        if name.split(".")[0] == "liger_trainer" and folder(name) not in ("", own):
            other = folder(name)
            assert LEVEL[other] < LEVEL[own], f"{path.name} imports {name}, which is not in a layer below {own}"


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=module_name)
def test_own_modules_are_imported_relatively(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    absolute = [n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level]
    assert not [name for name in absolute if name and name.split(".")[0] == "liger_trainer"]


def test_every_folder_says_what_it_is():
    for path in ROOT.glob("liger_trainer/**/"), ROOT.glob("kernels/*/"):
        for directory in path:
            if directory.name != "__pycache__":
                assert ast.get_docstring(ast.parse((directory / "__init__.py").read_text())), directory


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_packages_are_the_folders():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {module_name(file) for file in PACKAGE_FILES if file.stem == "__init__"}
    linked = {f"liger_trainer.{name}": name for name in ("configs", "kernels", "recipes")}
    recipes = {f"liger_trainer.recipes.{path.name}" for path in (ROOT / "recipes").glob("*/")}
    assert set(setuptools["packages"]) == folders | set(linked) | recipes
    assert setuptools["package-dir"] == linked
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for name in linked.values():
        assert os.readlink(ROOT / "liger_trainer" / name) == f"../{name}"


def test_import_is_light_and_leaves_the_name_kernels_alone():
    """HF's `kernels` package must be found, not our folder; heavy imports wait until a name is used."""
    code = (
        "import sys; from importlib.util import find_spec; import liger_trainer; "
        "assert find_spec('kernels') is None or 'site-packages' in find_spec('kernels').origin; "
        "print([name for name in sys.modules if name.split('.')[0] in ('transformers', 'trl', 'triton', 'torch')])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_type_checkers_and_users_see_the_same_names():
    tree = ast.parse((ROOT / "liger_trainer" / "__init__.py").read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    names = {alias.asname for node in block.body for alias in node.names if alias.name != "*"}
    of_trl = {name for name in liger_trainer.arguments.__all__ if name.endswith("Config")}  # through the `*`
    assert names == set(liger_trainer.__all__) - of_trl - {"__version__"}


def test_the_version_is_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "liger_trainer.__version__"}
    assert liger_trainer.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
