"""The ``liger-trainer`` command. Subcommands import what they need, so that ``--help`` answers at once."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from . import __version__
from .environment import environment

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def main(argv: list[str] | None = None) -> None:
    """Run a subcommand and exit with its status, or with status 2 if the arguments are wrong."""
    parser = argparse.ArgumentParser(
        prog="liger-trainer", description="Triton kernels for LLM training as a Hugging Face Trainer plugin."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train", help="run a recipe in this process; for several GPUs use `accelerate launch`", add_help=False
    )
    train.add_argument("-h", "--help", action=_TrainHelp, nargs=0)
    train.add_argument("recipe", help="YAML file, or a name from `liger-trainer recipes`, such as quickstart")
    train.add_argument("overrides", nargs=argparse.REMAINDER, help="--key value, for any key of a recipe")
    train.set_defaults(run=run_train)

    fit = commands.add_parser(
        "fit",
        help="find the largest batch that trains, with and without the kernels",
        description="Find the largest per_device_train_batch_size with which RECIPE trains on rows of its full "
        "max_length, with and without use_liger. Each size runs for a few steps in fresh processes. Any other "
        "--key value overrides the recipe.",
        allow_abbrev=False,
    )
    fit.add_argument("recipe", help="YAML file, or a name from `liger-trainer recipes`, such as quickstart")
    fit.add_argument(
        "--config_file", "--config-file", help="config for `accelerate launch`, such as configs/fsdp2.yaml"
    )
    fit.add_argument(
        "--num_processes",
        "--num-processes",
        type=int,
        help="number of processes for `accelerate launch` (default: the config's)",
    )
    fit.add_argument(
        "--use_liger",
        "--use-liger",
        choices=["both", "true", "false"],
        default="both",
        help="search with the kernels, without them, or both (default: %(default)s)",
    )
    fit.add_argument(
        "--max_batch", "--max-batch", type=int, default=1024, help="largest batch to try (default: %(default)s)"
    )
    fit.add_argument(
        "--resolution",
        type=float,
        default=1 / 16,
        help="stop when the result is within this fraction of the largest batch that fits (default: %(default)s)",
    )
    fit.add_argument("--json", metavar="FILE", help="write the results, the versions and the command to FILE")
    fit.set_defaults(run=run_fit, takes_rest=True)

    recipes = commands.add_parser("recipes", help="list the recipes that come with the package, or copy them")
    recipes.add_argument(
        "--copy", metavar="DIR", type=Path, help="copy the recipes and the configs for `accelerate launch` into DIR"
    )
    recipes.set_defaults(run=run_recipes)

    report = commands.add_parser("report", help="print what would be patched in a model; needs no weights")
    report.add_argument("model", help="hub name, local path, or recipe (.yaml file, or its name)")
    report.add_argument("overrides", nargs=argparse.REMAINDER, help="--key value, for any key of a recipe")
    report.set_defaults(run=run_report)

    bench = commands.add_parser("bench", help="measure ops or training (in a checkout)")
    bench.add_argument("subject", choices=["kernels", "train"])
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="arguments: see `liger-trainer bench SUBJECT --help`")
    bench.set_defaults(run=lambda args: run_benchmark(args.subject, args.rest))

    plot = commands.add_parser("plot", help="draw tables and plots from the results (in a checkout)", add_help=False)
    plot.set_defaults(run=lambda args: run_benchmark("plot", args.rest), takes_rest=True)

    env = commands.add_parser("env", help="print versions and devices, for a bug report")
    env.add_argument("--json", action="store_true", help="print JSON")
    env.set_defaults(run=run_env)

    args, rest = parser.parse_known_args(argv)
    if "takes_rest" in args:
        args.rest = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    sys.exit(args.run(args))


class _TrainHelp(argparse.Action):
    """Prints the keys of a recipe, which need heavy imports."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from .training.train import main as train

        train(["--help"])
        parser.exit()


def run_train(args: argparse.Namespace) -> None:
    """Train a recipe in this process."""
    from .training.train import main as train

    train([args.recipe, *args.overrides])


def run_fit(args: argparse.Namespace) -> int:
    """Search for the largest batch of a recipe."""
    from .training.fit import main as fit

    return fit(args)


def run_recipes(args: argparse.Namespace) -> int:
    """List the recipes of the package, or copy them."""
    from .training import shipped

    if args.copy is None:
        print(shipped.listing())
        return 0
    try:
        print("\n".join(map(str, shipped.copy_to(args.copy))))
    except OSError as error:
        print(f"liger-trainer: error: {error}", file=sys.stderr)
        return 2
    return 0


def run_report(args: argparse.Namespace) -> int:
    """Print what a run of a recipe, or ``apply_liger``, does to a model that is built without weights."""
    from .training.shipped import recipes

    try:
        if Path(args.model).suffix in (".yaml", ".yml") or args.model in recipes():
            from .training.build import planned_report

            report = planned_report([args.model, *args.overrides])
            print("use_liger is false: nothing is patched" if report is None else report)
        elif args.overrides:
            raise ValueError(f"overrides: got {args.overrides[0]!r} for a model; must follow a recipe")
        else:
            from .auto import report_of

            print(report_of(args.model))
    except (OSError, TypeError, ValueError) as error:
        print(f"liger-trainer: error: {error}", file=sys.stderr)
        return 2
    return 0


def run_benchmark(subject: str, rest: list[str]) -> int:
    """Run ``benchmarks/SUBJECT.py`` with the arguments ``rest``."""
    script = BENCHMARKS / f"{subject}.py"
    if not script.is_file():
        sys.exit(f"liger-trainer: error: {script.name} is not installed with the package; run this in a checkout")
    return subprocess.run([sys.executable, str(script), *rest], check=False).returncode


def run_env(args: argparse.Namespace) -> None:
    """Print versions and devices."""
    facts = environment()
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        text = ", ".join(value) if isinstance(value, list) else value
        print(f"{name:<14} {text or '-'}")


if __name__ == "__main__":
    main()
