"""Suites: the YAML files that say what ``liger-trainer bench train SUITE`` measures. Imports no torch.

::

    title: ...                       # title of the plot
    figure: ...                      # the paper's figure or table, or another reason to measure
    x: {key: max_length, label: ...} # an override's key, num_processes, or name (then the points are categories)
    arms: [hf, ours, ...]            # of peers.py
    rounds: 3                        # interleaved; a row holds their medians
    warmup: 2                        # steps that are not timed
    steps: 4                         # timed steps
    window: 2                        # steps per clock reading; divides warmup and steps
    launch: [{name: ..., config_file: configs/single.yaml, num_processes: 1}, ...]
    overrides: {...}                 # of the recipe, for all points
    environment: {...}               # variables of every run
    device: cpu                      # default: cuda
    curves: true                     # losses, not times: all points of an arm in one process, all arms at once
    points: [{name: ..., recipe: ..., overrides: {...}, vary: {max_length: [1024, 2048]}, steps: 2}, ...]
    smoke: {overrides: {...}, model: {...}, vary: {max_length: [16, 32]}}

``vary`` makes one point per value of its only key, named like "Llama-3-8B at sequence length 1024". A point may have
its own ``warmup``, ``steps`` and ``window``: if a step takes long, few are enough. With ``--smoke`` every recipe's
``model_config`` is shrunk (``SMOKE_MODEL``, then ``smoke: model``), ``SMOKE_OVERRIDES`` and ``smoke: overrides`` are
applied, and ``smoke: vary`` replaces the values of a key in the points' ``vary``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.peers import TRAIN_ARMS
from benchmarks.workers import ROOT
from liger_trainer.config import nearest

SUITES = ROOT / "benchmarks" / "suites"
REQUIRED = ("title", "figure", "x", "arms", "launch", "points")
TIMES = {"warmup": 2, "steps": 4, "window": 2}
KEYS = (*REQUIRED, *TIMES, "rounds", "overrides", "environment", "smoke", "curves", "device")
NOT_OVERRIDES = ("name", "num_processes")  # allowed as x, beside the overrides' keys
SMOKE_TIMES = {"warmup": 1, "steps": 2, "window": 1}
SMOKE_OVERRIDES = {
    "use_cpu": True, "dtype": "float32", "optim": "adamw_torch", "per_device_train_batch_size": 2, "max_length": 128,
    "dataloader_num_workers": 0,
}  # fmt: skip
# Sizes that replace those in a recipe's ``model_config``. A size that is not there is left out, but token ids are
# always set.
SMOKE_MODEL = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """A parsed suite.

    Args:
        about: the settings that tables and plots need.
        points: recipes with their overrides and numbers of steps, under the keys of result rows. The points that
            ``vary`` made of one entry share a ``group``.
        launches: how the ranks of a run are started, under the keys of result rows.
        arms: names of peers.
        rounds: how many times everything is measured.
        environment: environment variables of every run.
    """

    about: dict
    points: tuple[dict, ...]
    launches: tuple[dict, ...]
    arms: tuple[str, ...]
    rounds: int
    environment: dict[str, str]

    def places(self) -> list[list]:
        """Where each arm is measured: point, launch, processes."""
        return [[p["point"], launch["launch"], launch["processes"]] for p in self.points for launch in self.launches]

    def jobs(self) -> list[dict]:
        """All jobs in order: round by round, and within a round point by point, launch by launch, arm by arm.

        So the arms alternate (A B C A B C), and no job is repeated before every job has run once, even if the run is
        cut short.
        """
        x = {"num_processes": "processes"}.get(self.about["x"]["key"], "x")
        return [
            {
                **point,
                **launch,
                "x": {**point, **launch}[x],
                "arm": arm,
                "environment": self.environment,
                "round": number,
            }
            for number in range(self.rounds)
            for point in self.points
            for launch in self.launches
            for arm in self.arms
        ]


def load(path: Path, smoke: bool = False) -> Suite:
    """Read a suite.

    Args:
        path: the YAML file, or the name of one in ``benchmarks/suites``.
        smoke: tiny models on the CPU.

    Raises:
        ValueError: the file does not exist; a key is unknown (the message names the nearest) or missing; a value is
            not allowed.
    """
    if not path.is_file():
        known = sorted(file.stem for file in SUITES.glob("*.yaml"))
        _require(str(path.with_suffix("")) in known, "suite", str(path), f"a file, or one of {', '.join(known)}")
        path = SUITES / f"{path.stem}.yaml"
    content = {"rounds": 3, "environment": {}, "smoke": {}, "curves": False, "device": "cuda"} | yaml.safe_load(
        path.read_text(encoding="utf-8")
    )
    _check_keys(content, str(path), REQUIRED, KEYS)
    _check_keys(content["x"], f"{path}: x", ("key", "label"))
    _check_keys(content["smoke"], f"{path}: smoke", (), ("overrides", "model", "vary"))
    _check_keys(dict.fromkeys(content["arms"]), f"{path}: arms", (), TRAIN_ARMS)
    points = [point for entry in content["points"] for point in _points(entry, content, smoke, f"{path}: points")]
    if smoke:  # with smoke's ``vary``, entries with the same name make the same points
        points = list({point["point"]: point for point in points}.values())
    launches = []
    for entry in content["launch"]:
        _check_keys(entry, f"{path}: launch", ("name", "config_file", "num_processes"))
        file, processes = entry["config_file"], entry["num_processes"]
        _require((ROOT / file).is_file(), f"{path}: launch: config_file", file, "a file of the checkout")
        launches.append({"launch": entry["name"], "config_file": file, "processes": processes})
    about = {"name": path.stem, **{key: content[key] for key in ("title", "figure", "x", "arms", "curves", "device")}}
    variables = {name: str(value) for name, value in content["environment"].items()}
    rounds = 1 if smoke else content["rounds"]
    suite = Suite(about, tuple(points), tuple(launches), tuple(content["arms"]), rounds, variables)
    about["places"] = suite.places()
    for place in about["places"]:
        _require(about["places"].count(place) == 1, str(path), place, "unique, or rows replace each other")
    return suite


def _require(condition: bool, where: str, got: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{where}: got {got!r}; must be {allowed}")


def _check_keys(mapping: dict, where: str, required: Sequence[str], allowed: Sequence[str] = ()) -> None:
    for key in mapping:
        known = (*required, *allowed)
        _require(key in known, where, key, f"one of {', '.join(known)}{nearest(str(key), known)}")
    for key in required:
        _require(mapping.get(key) is not None, f"{where}: {key}", None, "given")


def _points(entry: dict, content: dict, smoke: bool, where: str) -> list[dict]:
    """The points of one entry: one, or one for each value of ``vary``."""
    _check_keys(entry, where, ("name", "recipe"), ("overrides", "vary", *TIMES))
    name, recipe, where = entry["name"], entry["recipe"], f"{where}: {entry['name']!r}"
    times = SMOKE_TIMES if smoke else {key: entry.get(key, content.get(key, TIMES[key])) for key in TIMES}
    divides = times["steps"] % times["window"] == 0 == times["warmup"] % times["window"]
    _require(divides, where, times, "such that warmup and steps are multiples of window")
    _require((ROOT / recipe).is_file(), f"{where}: recipe", recipe, "a file of the checkout")
    overrides = {**content.get("overrides", {}), **entry.get("overrides", {})}
    vary = entry.get("vary", {})
    if smoke:
        settings = content["smoke"]
        tiny = _shrunk_model(recipe, overrides, settings.get("model", {}), where)
        overrides = {**overrides, **SMOKE_OVERRIDES, **settings.get("overrides", {}), "model_config": tiny}
        vary = {key: settings.get("vary", {}).get(key, values) for key, values in vary.items()}
    key, made = content["x"]["key"], [(name, overrides)]
    for varied, values in vary.items():
        label = content["x"]["label"] if varied == key else varied
        made = [(f"{name} at {label} {value}", {**overrides, varied: value}) for value in values]
    for _, chosen in made:
        expected = f"one of its overrides or vary: {', '.join(chosen)}"
        _require(key in (*chosen, *NOT_OVERRIDES), f"{where}: x", key, expected)
    shared = {"group": name, "recipe": recipe, **times}
    return [{"point": point, **shared, "overrides": chosen, "x": chosen.get(key)} for point, chosen in made]


def _shrunk_model(recipe: str, overrides: dict, model: dict, where: str) -> dict:
    """The recipe's own ``model_config``, of its own model type, with few and small layers."""
    config = overrides.get("model_config") or yaml.safe_load((ROOT / recipe).read_text()).get("model_config")
    _require(config is not None, f"{where}: model_config", config, f"in {recipe} or in the overrides for --smoke")
    sizes = {key: size for key, size in SMOKE_MODEL.items() if key in config or key.endswith("_token_id")}
    return {**config, **sizes, **model}
