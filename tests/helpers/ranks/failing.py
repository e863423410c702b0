"""One rank of a run that fails: ``torchrun ... -m ranks.failing HOW RECIPE [--key value ...]``.

HOW is what happens to rank 1 at the end of step 3: ``killed``, ``out_of_memory``; or ``never``.
"""

import atexit
import os
import signal
import sys
import threading

import torch
from transformers import TrainerCallback

from liger_trainer.training import train


class Fail(TrainerCallback):
    def __init__(self, how):
        self.how = how

    def on_train_end(self, *_, **kwargs):
        threading.Timer(1, print, ["a thread ended"], {"flush": True}).start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step != 3 or args.process_index != 1:
            return
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "out_of_memory" and args.device.type == "cuda":
            torch.empty(1 << 44, dtype=torch.int8, device=args.device)
        elif self.how == "out_of_memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")


def main(how: str, argv: list[str]):
    build = train.build_trainer

    def build_failing(recipe):
        trainer = build(recipe)
        trainer.add_callback(Fail(how))
        return trainer

    atexit.register(print, "an exit handler ran", flush=True)
    train.build_trainer = build_failing
    train.main(argv)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
