"""Plots (PNG) and tables (Markdown) of every result file in a folder.

    liger-trainer plot
    liger-trainer plot --update README.md docs/paper.md

``--update`` replaces what stands between ``<!-- table:NAME -->`` and ``<!-- /table -->`` in the given files; ``--list``
prints the names there are.
"""

import argparse
import json
import re
import sys
from pathlib import Path

if not __package__:  # run as a script; see kernels.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common, curve, models, plot_kernels, plot_train

MARKER = re.compile(r"(<!-- table:(\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def provenance_line(data: dict) -> str:
    """Where the numbers come from; where runs differ, all there is."""
    runs = data["runs"]
    names = dict.fromkeys(name for run in runs for name in run["packages"])
    found = {name: _differing([run["packages"][name] for run in runs if name in run["packages"]]) for name in names}
    packages = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    dates = sorted(r["date"][:10] for r in runs)
    commits = sorted({r["commit"][:12] + ("+uncommitted" if "+" in r["commit"] else "") for r in runs})
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    most = max((row.get("processes", 1) for row in data["results"]), default=1)
    device = _differing([run["device"] for run in runs])
    device = device if most == 1 else f"up to {most} x {device}"
    driver = _differing([run["driver"] for run in runs])
    driver = "" if driver is None else f"driver {driver}, "
    return f"{device}, {driver}{packages}; {when}; commit {', '.join(commits)}"


def _differing(values: list[str | None]) -> str | None:
    """All different values as a text; None where there is none but None."""
    values = list(dict.fromkeys(values))
    return None if values == [None] else " and ".join(value or "none" for value in values)


def update(path: Path, made: dict[str, str]) -> None:
    """Replace the marked tables of one file.

    Raises ``ValueError`` for a marker whose table does not exist, naming both.
    """

    def replace(match: re.Match) -> str:
        if match[2] not in made:
            raise ValueError(f"{path}: no table {match[2]!r}; there are {', '.join(sorted(made)) or 'none'}")
        return match[1] + made[match[2]] + match[3]

    text = path.read_text()
    opened = text.count("<!-- table:")
    if opened != len(MARKER.findall(text)):
        raise ValueError(
            f"{path}: {opened} table markers, {len(MARKER.findall(text))} of them closed by <!-- /table -->"
        )
    path.write_text(MARKER.sub(replace, text))


def main(argv: list[str] | None = None) -> int:
    """Draw and write everything; 1 where there are no results."""
    parser = argparse.ArgumentParser(
        prog="liger-trainer plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="folder of the result files")
    parser.add_argument(
        "--update", type=Path, nargs="*", default=[], metavar="FILE", help="Markdown files with markers"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the tables and do nothing else")
    args = parser.parse_args(argv)
    files = sorted([*args.results.glob("kernels-*.json"), *args.results.glob("train-*.json")])
    if not files:
        print(f"no result files in {args.results}", file=sys.stderr)
        return 1
    made: dict[str, str] = {}
    for file in files:
        data, stem = json.loads(file.read_text()), file.stem
        kind = plot_train if stem.startswith("train") else plot_kernels
        own = kind.make_tables(stem, data, f"\n\n{provenance_line(data)}\n")
        made |= own
        if args.list:
            continue
        sections = [f"## {name}\n\n{text}" for name, text in own.items() if not name.endswith(plot_kernels.SETS)]
        file.with_suffix(".md").write_text(f"# {stem}\n\n" + "\n".join(sections))
        for path in [file.with_suffix(".md"), *kind.plot(data, stem, args.results)]:
            print(path)
    for file in sorted(args.results.glob("linear-ce-curve-*.json")):
        data = json.loads(file.read_text())
        made[file.stem] = f"{curve.make_table(data)}\n\n{data['device']}; commit {data['run']['commit']}\n"
        if not args.list:
            curve.plot(data, file.with_suffix(".png"))
            print(file.with_suffix(".png"))
    for file in args.results.glob("models*.json"):
        data = json.loads(file.read_text())
        made[file.stem] = f"{models.make_table(data['results'])}\n{provenance_line(data)}\n"
        made[f"{file.stem}-summary"] = f"{models.summary(data['results'])}\n"
    if args.list:
        print("\n".join(made))
        return 0
    for path in args.update:
        update(path, made)
        print(f"{path} updated")
    return 0


if __name__ == "__main__":
    sys.exit(main())
