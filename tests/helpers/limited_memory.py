"""A trial of ``liger-trainer fit`` on a machine with little memory: ``python limited_memory.py MIB JOB``.

MIB is how much address space may be added to what the imports have taken.
"""

import json
import resource
import sys
from pathlib import Path

import liger_trainer.arguments.trainer
import liger_trainer.patching  # noqa: F401  and all of torch that the run needs
from liger_trainer.training import fit_trial
from liger_trainer.training.recipe import parse_recipe

if __name__ == "__main__":
    job = json.loads(sys.argv[2])
    parse_recipe(job["argv"])
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + int(sys.argv[1]) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    fit_trial.main(job)
