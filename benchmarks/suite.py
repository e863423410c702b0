"""Suites: what ``liger-trainer bench train SUITE.yaml`` measures. Imports no torch.

::

    title: ...                       # heads the plot and the table
    figure: ...                      # the paper's figure or table, or what else it stands for
    x: {key: max_length, label: ...} # an override's key, num_processes, or name (then the points are categories)
    arms: [hf, ours, ...]            # of train_arms.py
    rounds: 3                        # interleaved; a row holds their medians
    warmup: 2                        # steps that are not timed
    steps: 4                         # timed steps
    window: 2                        # steps between two readings of the clock; divides warmup and steps
    launch: [{name: ..., config_file: configs/single.yaml, num_processes: 1}, ...]
    overrides: {...}                 # of the recipe, for all points
    environment: {...}               # variables of every run
    points: [{name: ..., recipe: ..., overrides: {...}, vary: {max_length: [1024, 2048]}, steps: 2}, ...]
    smoke: {overrides: {...}, model: {...}, vary: {max_length: [16, 32]}}

``vary`` makes one point of each value of its one key, named like "Llama-3-8B at sequence length 1024". A point may have
``warmup``, ``steps`` and ``window`` of its own: where a step takes long, few are enough. With ``--smoke``
every recipe's ``model_config`` is shrunk (``SMOKE_MODEL``, then the suite's ``model``), ``SMOKE_OVERRIDES`` and the
suite's ``overrides`` apply, and ``vary`` there replaces the values of that key.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import ROOT
from benchmarks.train_arms import ARMS
from liger_trainer.config import nearest

SUITES = ROOT / "benchmarks" / "suites"
KEYS = (
    "title", "figure", "x", "arms", "rounds", "warmup", "steps", "window", "launch", "overrides", "environment",
    "points", "smoke",
)  # fmt: skip
REQUIRED = ("title", "figure", "x", "arms", "launch", "points")
ROUNDS = 3
TIMES = {"warmup": 2, "steps": 4, "window": 2}
NOT_OVERRIDES = ("name", "num_processes")  # what else x can be
SMOKE_TIMES = {"warmup": 1, "steps": 2, "window": 1}
SMOKE_OVERRIDES = {
    "use_cpu": True,
    "dtype": "float32",
    "optim": "adamw_torch",
    "per_device_train_batch_size": 2,
    "max_length": 128,
    "dataloader_num_workers": 0,
}
# Sizes that replace a recipe's own; what a model type does not have is left out.
SMOKE_MODEL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Launch:
    """How the ranks of a run are started."""

    name: str
    config_file: str
    num_processes: int


@dataclass(frozen=True)
class Point:
    """One recipe with its overrides; ``group`` is shared by the points that ``vary`` made of one entry."""

    name: str
    group: str
    recipe: str
    overrides: dict
    x: Any
    warmup: int
    steps: int
    window: int


@dataclass(frozen=True)
class Suite:
    """A parsed suite; ``about`` is what tables and plots need of it."""

    name: str
    about: dict
    arms: tuple[str, ...]
    rounds: int
    launches: tuple[Launch, ...]
    points: tuple[Point, ...]
    environment: dict[str, str]
    smoke: bool


def load(path: Path, smoke: bool = False) -> Suite:
    """Read a suite.

    Args:
        path: the YAML file, or the name of one in ``benchmarks/suites``.
        smoke: tiny models on the CPU.

    Raises:
        ValueError: no such file; a key that does not exist (names the nearest) or is missing; a value that is not
            allowed.
    """
    known = sorted(file.stem for file in SUITES.glob("*.yaml"))
    if not path.is_file():
        named = SUITES / f"{path.name.removesuffix('.yaml')}.yaml"
        if path.parent != Path() or not named.is_file():
            raise ValueError(f"suite: no such file: {str(path)!r}; benchmarks/suites has {', '.join(known)}")
        path = named
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    _check_keys(content, KEYS, str(path), REQUIRED)
    _check_keys(content["x"], ("key", "label"), f"{path}: x", ("key", "label"))
    settings = content.get("smoke") or {}
    _check_keys(settings, ("overrides", "model", "vary"), f"{path}: smoke")
    rounds = 1 if smoke else content.get("rounds", ROUNDS)
    _check_counts({"rounds": rounds}, str(path))
    points = tuple(point for entry in content["points"] for point in _points(entry, content, smoke, path))
    if smoke:  # ``vary`` there makes the same points of all entries of one name
        points = tuple({point.name: point for point in points}.values())
    _unique((point.name for point in points), f"{path}: points")
    launches = tuple(_launch(entry, path) for entry in content["launch"])
    _unique(((launch.name, launch.num_processes) for launch in launches), f"{path}: launch")
    about = {"name": path.stem, **{key: content[key] for key in ("title", "figure", "x")}}
    about["arms"] = _arms(content["arms"], path)
    about["recipes"] = sorted({point.recipe for point in points})
    about["places"] = [[point.name, launch.name, launch.num_processes] for point in points for launch in launches]
    environment = content.get("environment") or {}
    if not isinstance(environment, dict):
        raise ValueError(f"{path}: environment must be a mapping of names to values, got {environment!r}")
    environment = {name: str(value) for name, value in environment.items()}
    return Suite(path.stem, about, tuple(about["arms"]), rounds, launches, points, environment, smoke)


def _check_counts(counts: dict[str, Any], where: str) -> None:
    for key, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: {key} must be an integer of at least 1, got {value!r}")


def _check_keys(mapping: Any, allowed: Iterable[str], where: str, required: Iterable[str] = ()) -> None:
    if not isinstance(mapping, dict):
        raise ValueError(f"{where}: must be a mapping of {', '.join(allowed)}; got {mapping!r}")
    for key in mapping:
        if key not in allowed:
            raise ValueError(
                f"{where}: unknown key {key!r}{nearest(str(key), allowed)}; there are {', '.join(allowed)}"
            )
    for key in required:
        if mapping.get(key) is None:
            raise ValueError(f"{where}: {key} is missing")


def _unique(names: Iterable, where: str) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{where}: {name!r} is there twice: the rows would replace each other")
        seen.add(name)


def _arms(names: list[str], path: Path) -> list[str]:
    for name in names:
        if name not in ARMS:
            raise ValueError(f"{path}: arms: {name!r} is none{nearest(str(name), ARMS)}; there are {', '.join(ARMS)}")
    return names


def _launch(entry: dict, path: Path) -> Launch:
    keys = ("name", "config_file", "num_processes")
    _check_keys(entry, keys, f"{path}: launch", keys)
    launch = Launch(**entry)
    if not (ROOT / launch.config_file).is_file():
        raise ValueError(f"{path}: launch {launch.name!r}: config_file: no such file: {launch.config_file!r}")
    if not isinstance(launch.num_processes, int) or launch.num_processes < 1:
        raise ValueError(f"{path}: launch {launch.name!r}: num_processes must be at least 1, got {entry}")
    return launch


def _points(entry: dict, content: dict, smoke: bool, path: Path) -> list[Point]:
    """The points of one entry: one, or one for each value of ``vary``."""
    _check_keys(entry, ("name", "recipe", "overrides", "vary", *TIMES), f"{path}: points", ("name", "recipe"))
    where = f"{path}: point {entry['name']!r}"
    times = SMOKE_TIMES if smoke else {key: entry.get(key, content.get(key, TIMES[key])) for key in TIMES}
    _check_counts(times, where)
    if times["steps"] % times["window"] or times["warmup"] % times["window"]:
        raise ValueError(f"{where}: warmup and steps must be multiples of window, got {times}")
    if "," in entry["name"]:
        raise ValueError(f"{where}: a name must have no comma, which parts the names that --points takes")
    if not (ROOT / entry["recipe"]).is_file():
        raise ValueError(f"{where}: recipe: no such file: {entry['recipe']!r}")
    settings = (content.get("smoke") or {}) if smoke else {}
    overrides = {**(content.get("overrides") or {}), **(entry.get("overrides") or {})}
    if smoke:
        tiny = _shrunk_model(entry["recipe"], overrides, settings.get("model") or {}, where)
        overrides = {**overrides, **SMOKE_OVERRIDES, **(settings.get("overrides") or {}), "model_config": tiny}
    vary = dict(entry.get("vary") or {})
    if len(vary) > 1:
        raise ValueError(f"{where}: vary must have one key, got {', '.join(vary)}")
    key = content["x"]["key"]
    made = []
    for varied, values in vary.items():
        for value in (settings.get("vary") or {}).get(varied, values):
            label = content["x"]["label"] if varied == key else varied
            made.append((f"{entry['name']} at {label} {value}", {**overrides, varied: value}))
    made = made or [(entry["name"], overrides)]
    for _, chosen in made:
        if key not in chosen and key not in NOT_OVERRIDES:
            raise ValueError(f"{where}: x is {key!r}, which is no key of its overrides or vary: {', '.join(chosen)}")
    return [
        Point(name, entry["name"], entry["recipe"], chosen, None if key in NOT_OVERRIDES else chosen[key], **times)
        for name, chosen in made
    ]


def _shrunk_model(recipe: str, overrides: dict, model: dict, where: str) -> dict:
    """The recipe's own ``model_config``, of its own model type, with few and small layers."""
    config = overrides.get("model_config") or yaml.safe_load((ROOT / recipe).read_text()).get("model_config")
    if config is None:
        raise ValueError(f"{where}: --smoke needs a model_config in {recipe} or in the overrides")
    sizes = {k: v for k, v in SMOKE_MODEL.items() if k in config or k.endswith("_token_id")}
    return {**config, **sizes, **model}
