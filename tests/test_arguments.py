"""Argument classes: imported when first used, and found where older pickles look for them."""

import pickle
import subprocess
import sys

import pytest

import liger_trainer


def test_trl_is_imported_with_the_first_of_its_classes():
    code = (
        "import sys, liger_trainer; from liger_trainer import LigerTrainingArguments; assert 'trl' not in sys.modules; "
        "dir(liger_trainer); hasattr(liger_trainer, 'LigerXConfig'); assert 'trl' not in sys.modules; "
        "from liger_trainer import LigerSFTConfig; assert 'trl' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", liger_trainer.arguments.__all__)
def test_older_pickles_load(name, tmp_path):
    """``training_args.bin`` of version 0.1.0 names the classes as members of ``liger_trainer.arguments``."""
    cls = getattr(liger_trainer, name)
    args = cls(str(tmp_path), use_liger=True, liger_config={"rope": False}, bf16=False, use_cpu=True)
    written = pickle.dumps(args, protocol=2)  # torch.save's
    module = f"c{cls.__module__}\n{name}\n".encode()
    assert module in written
    older = written.replace(module, f"cliger_trainer.arguments\n{name}\n".encode())
    assert type(pickle.loads(older)) is cls
    assert pickle.loads(older).to_dict() == args.to_dict()
