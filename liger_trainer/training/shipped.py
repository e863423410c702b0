"""The recipes and launch configs that come with the package, and so with ``pip install``."""

import re
import shutil
import textwrap
from pathlib import Path

from ..config import nearest
from .recipe_arguments import RecipeError

# Symbolic links to the folders of a checkout; an installed package has the folders themselves.
PACKAGE = Path(__file__).parents[1]
RECIPES, CONFIGS = PACKAGE / "recipes", PACKAGE / "configs"
WIDTH = 120


def recipes() -> dict[str, Path]:
    """The files of the recipes by name: ``quickstart``, ``paper/qwen2_7b``."""
    files = sorted(RECIPES.glob("**/*.yaml"), key=lambda file: (len(file.parts), file))
    return {file.relative_to(RECIPES).with_suffix("").as_posix(): file for file in files}


def recipe_file(name: str) -> Path:
    """The file of a recipe, from its path or from the name of one that comes with the package.

    Raises:
        RecipeError: There is neither such a file nor such a name.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = recipes()
    if name not in shipped:
        hint = nearest(Path(name).stem, shipped)
        raise RecipeError(f"recipe: no such file: {name!r}, nor a name that `liger-trainer recipes` lists{hint}")
    return shipped[name]


def descriptions() -> dict[str, str]:
    """What the header of each recipe says first, by name."""
    made = {}
    for name, file in recipes().items():
        header = file.read_text(encoding="utf-8").split("\n#\n")[0].removeprefix("# ").replace("\n# ", " ")
        made[name] = re.split(r"[.:](?:\s|$)", header, maxsplit=1)[0]
    return made


def listing() -> str:
    """A line of at most ``WIDTH`` characters for each recipe: its name and what it trains."""
    about = descriptions()
    width = max(map(len, about))
    return "\n".join(f"{name:<{width}}  {textwrap.shorten(text, WIDTH - width - 2)}" for name, text in about.items())


def copy_to(folder: Path) -> list[Path]:
    """Copy the recipes to ``folder/recipes`` and the configs to ``folder/configs``, where their headers expect them.

    Raises:
        FileExistsError: One of these two folders is there. Nothing is copied.
    """
    copies = {source: folder / source.name for source in (RECIPES, CONFIGS)}
    for target in copies.values():
        if target.exists():
            raise FileExistsError(f"--copy: got {str(folder)!r}; must not contain {target.name!r}")
    for source, target in copies.items():
        shutil.copytree(source, target)
    return list(copies.values())
