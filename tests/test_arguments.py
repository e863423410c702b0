"""Argument classes: imported when first used, and found where older pickles look for them."""

import copy
import io
import pickle
import re
import subprocess
import sys

import pytest
import torch
from training import arguments, assert_same_run
from transformers import Seq2SeqTrainer, T5Config, T5ForConditionalGeneration, TrainingArguments

import liger_trainer
from liger_trainer import LigerConfig
from liger_trainer.patching import patch_state


def test_trl_is_imported_with_the_first_of_its_classes():
    code = (
        "import sys, liger_trainer; from liger_trainer import LigerTrainingArguments; assert 'trl' not in sys.modules; "
        "dir(liger_trainer); hasattr(liger_trainer, 'LigerXConfig'); assert 'trl' not in sys.modules; "
        "from liger_trainer import LigerSFTConfig; assert 'trl' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_option_is_described():
    """The docs site makes its table of options from this docstring."""
    section = (LigerConfig.__doc__ or "").split("Args:\n")[1].split("\n\n")[0]
    assert set(re.findall(r"^        (\w+): \S", section, re.MULTILINE)) == set(LigerConfig().to_dict())


class OlderPickler(pickle.Pickler):
    """Pickles our arguments as version 0.1.0 did."""

    def reducer_override(self, obj):
        return object.__reduce_ex__(obj, 2) if isinstance(obj, TrainingArguments) else NotImplemented


@pytest.mark.parametrize("name", liger_trainer.arguments.__all__)
def test_older_pickles_load(name, tmp_path):
    """``training_args.bin`` of version 0.1.0 names the classes as members of ``liger_trainer.arguments``."""
    cls = getattr(liger_trainer, name)
    args = cls(str(tmp_path), use_liger=True, liger_config={"rope": False}, bf16=False, use_cpu=True)
    written = io.BytesIO()
    pickler = OlderPickler(written, protocol=2)  # torch.save's
    pickler.dump(args)
    written = written.getvalue()
    module = f"c{cls.__module__}\n{name}\n".encode()
    assert module in written
    older = written.replace(module, f"cliger_trainer.arguments\n{name}\n".encode())
    assert type(pickle.loads(older)) is cls
    assert pickle.loads(older).to_dict() == args.to_dict()


def test_pickles_load_without_this_package(tmp_path):
    """As the class of transformers or TRL, and within the process as they were."""
    names = liger_trainer.arguments.__all__
    for name in names:
        args = getattr(liger_trainer, name)(str(tmp_path), use_liger=True, seed=5, bf16=False, use_cpu=True)
        torch.save(args, tmp_path / f"{name}.bin")
        loaded = torch.load(tmp_path / f"{name}.bin", weights_only=False)
        for made in (loaded, copy.copy(args), copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
            assert type(made) is type(args)
            assert made == args
            assert made is not args
    code = f"""if True:
        import sys, torch
        sys.modules["liger_trainer"] = None
        for name in {names}:
            args = torch.load(f"{tmp_path}/{{name}}.bin", weights_only=False)
            assert type(args).__name__ == name.removeprefix("Liger"), type(args)
            assert type(args).__module__.partition(".")[0] in ("transformers", "trl")
            assert args.seed == 5 and args.to_dict()
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def seq2seq(output_dir, cls, use_liger, **options):
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
                                                decoder_start_token_id=0, dropout_rate=0.0))  # fmt: skip
    args = arguments(output_dir, cls=cls, use_liger=use_liger, max_steps=2, **options)
    rows = [{"input_ids": list(range(2, 10)), "labels": list(range(3, 9))}] * 8
    return Seq2SeqTrainer(model, args, train_dataset=rows, eval_dataset=rows[:2])


def test_seq2seq(tmp_path):
    trainers = []
    for flag in (False, True):
        options = {"predict_with_generate": True, "generation_max_length": 6}
        trainer = seq2seq(tmp_path, liger_trainer.LigerSeq2SeqTrainingArguments, flag, **options)
        trainer.train()
        trainers.append(trainer)
    assert_same_run(*trainers)
    evaluations = [trainer.evaluate()["eval_loss"] for trainer in trainers]
    assert evaluations[1] == pytest.approx(evaluations[0])
    assert patch_state(trainers[1].model).report.ran["rms_norm"] == 2
    with pytest.raises(TypeError, match=r"LigerTrainingArguments.*must be LigerSeq2SeqTrainingArguments"):
        seq2seq(tmp_path, liger_trainer.LigerTrainingArguments, True)
    assert not hasattr(arguments(tmp_path), "generation_config")


def test_padding_mask_is_deprecated_and_still_works():
    with pytest.warns(FutureWarning, match="unpad takes its place"):
        assert liger_trainer.LigerConfig.parse({"padding_mask": False}).wants("padding_mask") is False
    assert liger_trainer.LigerConfig().unpad is True
