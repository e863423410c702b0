"""The ``liger-trainer`` command. Heavy imports happen inside the subcommands, so that ``--help`` answers at once."""

import argparse
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PACKAGES = ("liger-trainer", "torch", "triton", "transformers", "accelerate", "trl", "peft", "datasets", "deepspeed")


def main(argv: list[str] | None = None):
    """Entry point. Exits with status 2 on bad arguments, else with that of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="liger-trainer", description="Triton kernels for LLM training as a Hugging Face Trainer plugin."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="run a recipe in this process; several GPUs: see `accelerate launch`")
    train.add_argument("recipe", help="YAML file, such as recipes/quickstart.yaml")
    train.add_argument("overrides", nargs=argparse.REMAINDER, help="--key value of anything the recipe can say")
    train.set_defaults(run=run_train)

    report = commands.add_parser("report", help="print what would be patched in a model; no weights needed")
    report.add_argument("model", help="hub name, local path, or a recipe (.yaml)")
    report.set_defaults(run=run_report)

    bench = commands.add_parser("bench", help="measure ops or training, in a checkout")
    bench.add_argument("subject", choices=["kernels", "train"])
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="arguments of benchmarks/SUBJECT.py")
    bench.set_defaults(run=lambda args: run_benchmark(args.subject, args.rest))

    plot = commands.add_parser("plot", help="draw tables and plots from the results, in a checkout", add_help=False)
    plot.set_defaults(run=lambda args: run_benchmark("plot", args.rest))

    env = commands.add_parser("env", help="print versions and devices, for a bug report")
    env.add_argument("--json", action="store_true", help="as JSON")
    env.set_defaults(run=run_env)

    args, rest = parser.parse_known_args(argv)
    if args.run is plot.get_default("run"):
        args.rest = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    sys.exit(args.run(args))


def run_train(args):
    """Train by the recipe in this process."""
    from .train import main as train

    train([args.recipe, *args.overrides])


def run_report(args):
    """Print what ``apply_liger`` does to the model, built from its config on the meta device."""
    try:
        config, liger_config = model_config(args.model)
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"liger-trainer: error: {error}")
    import torch
    from transformers import AutoModelForCausalLM

    from .patching import apply_liger

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    print(apply_liger(model, liger_config))


def model_config(source: str):
    """The transformers config and the ``liger_config`` that ``source`` stands for.

    Args:
        source: hub name or local path of a model, or a recipe ending in ``.yaml`` or ``.yml``.
    """
    from transformers import AutoConfig

    if Path(source).suffix not in (".yaml", ".yml"):
        return AutoConfig.from_pretrained(source), None
    from .recipe import parse_recipe

    recipe = parse_recipe([source])
    if recipe.run.model_config is not None:
        return AutoConfig.for_model(**recipe.run.model_config), recipe.training.liger_config
    return AutoConfig.from_pretrained(recipe.model.model_name_or_path), recipe.training.liger_config


def run_benchmark(subject: str, rest: list[str]) -> int:
    """Run ``benchmarks/SUBJECT.py`` with the arguments ``rest``."""
    script = BENCHMARKS / f"{subject}.py"
    if not script.is_file():
        sys.exit(f"liger-trainer: error: {script.name} is not installed with the package: run this in a checkout")
    return subprocess.run([sys.executable, str(script), *rest], check=False).returncode


def run_env(args):
    """Print versions of what matters, and the devices."""
    facts = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = None
    import torch

    facts["cuda"] = torch.version.cuda
    facts["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts["driver"] = nvidia_driver()
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        text = ", ".join(value) if isinstance(value, list) else value
        print(f"{name:<14} {text or '-'}")


def nvidia_driver() -> str | None:
    """Version of the NVIDIA driver, or ``None`` without one."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return lines[0] if lines else None


if __name__ == "__main__":
    main()
