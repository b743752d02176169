"""One command at a time trains into a folder, or evaluates."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ilrec_dist.common.files import inherit_lock
from ilrec_dist.common.run_layout import RESULT
from ilrec_dist.distributed.layout import from_rank0, is_rank0


@contextmanager
def exclusive_folder(folder: Path, patience: float) -> Iterator[bool]:
    """Hold a training's folder, and say whether its training is finished already, or
    hold that of all trainings, of which the evaluation is the last work.

    Rank 0 waits for the lock, which a killed run's last processes may still hold:
    they may finish the training. Raises NotWritable where one still holds it after
    `patience` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if is_rank0():
            stack.callback(os.close, inherit_lock(folder / ".lock", patience))
            for leftover in folder.glob(".*.writing-*"):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()
        yield from_rank0((folder / RESULT).exists())
