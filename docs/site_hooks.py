"""What ``make docs`` does beyond mkdocs: pages from outside of docs/, links between them, and generated tables.

The repository's own files are written to be read where they lie: a link is relative to the repository. On the site,
docs/ is the root, README.md is the home page, and links to source files become plain text.
"""

import dataclasses
import importlib
import posixpath
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
OUTSIDE = (
    "kernels/README.md", "benchmarks/*.md", "benchmarks/results/*", "examples/*.py", "examples/*.ipynb",
    "CHANGELOG.md", "CONTRIBUTING.md",
)  # fmt: skip
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
TABLE = re.compile(r"<!-- generated: (\w+) -->")


def on_startup(command: str, dirty: bool) -> None:
    """Copy the package for mkdocstrings, which follows no link and enters no folder without an ``__init__.py``."""
    copy = ROOT / "out" / "api"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT / "liger_trainer", copy / "liger_trainer", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "liger_trainer" / "kernels" / "__init__.py").touch()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, plots and logs from outside of docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the generated tables, and turn the repository's links into the site's."""
    source = Path(page.file.abs_src_path or "").relative_to(ROOT).as_posix()
    markdown = TABLE.sub(lambda match: TABLES[match[1]](), markdown)
    parts = re.split(r"(^```.*?^```|`[^`\n]+`)", markdown, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [LINK.sub(lambda match: link(match, source, page, files), part) for part in parts[::2]]
    return "".join(parts)


def link(match: re.Match, source: str, page: Page, files: Files) -> str:
    """A link of the repository as one of the site; plain text if its target is a file that the site does not have."""
    image, text, target, anchor = match.groups()
    if not target or ":" in target:
        return match[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    place = "index.md" if path == "README.md" else path.removeprefix("docs/")
    if files.get_file_from_path(place) is None:
        return text if (ROOT / path).exists() else match[0]
    return f"{image}[{text}]({posixpath.relpath(place, posixpath.dirname(page.file.src_uri))}{anchor or ''})"


def cell(text: object) -> str:
    """``text`` within a table."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def table(heading: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [heading, tuple("---" for _ in heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def options() -> str:
    """The fields of ``LigerConfig``, described in its docstring."""
    from liger_trainer.config import LigerConfig

    section = (LigerConfig.__doc__ or "").split("Args:\n")[1].split("\n\n")[0]
    texts = dict(re.findall(r"^        (\w+): (.*?)(?=^        \w+:|\Z)", section, re.DOTALL | re.MULTILINE))
    rows = [
        (f"`{field.name}`", f"`{str(field.default).lower()}`", cell(texts[field.name].replace("``", "`")))
        for field in dataclasses.fields(LigerConfig)
    ]
    return table(("option", "default", "what it does"), rows)


def recipe_keys() -> str:
    """The keys that this package adds to those of transformers and TRL."""
    from liger_trainer.training.recipe_arguments import MedusaArguments, RecipeArguments, TokenArguments

    made = []
    for cls in (RecipeArguments, TokenArguments, MedusaArguments):
        rows = [
            (f"`{field.name}`", f"`{field.default}`", cell(field.metadata["help"])) for field in dataclasses.fields(cls)
        ]
        about = cell((cls.__doc__ or "").split("\n\n")[0].replace("``", "`"))
        made.append(f"{about}\n\n{table(('key', 'default', 'meaning'), rows)}")
    return "\n\n".join(made)


def argument_classes() -> str:
    """The argument classes, and the class of transformers or TRL that each extends."""
    from liger_trainer import arguments

    rows = []
    for name in arguments.__all__:
        bases: tuple[Any, ...] = getattr(arguments, name).__mro__
        base = next(base for base in bases if not base.__module__.startswith("liger_trainer"))
        rows.append((f"`{name}`", f"`{base.__module__.split('.')[0]}.{base.__name__}`"))
    return table(("class", "extends"), rows)


def recipes() -> str:
    """The recipes that come with the package."""
    from liger_trainer.training import shipped

    rows = [(f"`{name}`", cell(text)) for name, text in shipped.descriptions().items()]
    return table(("recipe", "what it trains"), rows)


def reference(names: list[str], options: str = "") -> str:
    """The places of these objects' documentation, which mkdocstrings fills."""
    return "\n\n".join(f"::: {name}{options}" for name in names)


def public(package: str, options: str = "") -> str:
    """The documentation of what a package exports, functions first."""
    exports = vars(importlib.import_module(package))
    objects = sorted((exports[name] for name in exports["__all__"]), key=lambda thing: isinstance(thing, type))
    return reference([f"{thing.__module__}.{thing.__name__}" for thing in objects], options)


def losses() -> str:
    """The losses."""
    return public("liger_trainer.losses")


def modules() -> str:
    """The modules."""
    return public("liger_trainer.nn", "\n    options: {members: [forward]}")


def kernels() -> str:
    """The ops: in each file of kernels/, the function of its name."""
    names = [path.stem for path in sorted((ROOT / "kernels").glob("*.py")) if f"\ndef {path.stem}(" in path.read_text()]
    return reference([f"liger_trainer.kernels.{name}.{name}" for name in names])


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (options, recipe_keys, argument_classes, recipes, losses, modules, kernels)
}
