"""What processes compute in tests of `items.spread`; light to load."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ilrec_dist.common.errors import UserError


def lengths(texts: Sequence[str]) -> np.ndarray:
    """float32 [n, 2]: how long each text is, and the process that was asked.

    The text "kill" ends this process, "refuse" is bad input, and "sleep PATH" leaves
    this process's number in PATH and sleeps.
    """
    for text in texts:
        if text == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if text == "refuse":
            raise UserError("items.text_model: /gone is not a model folder")
        if text.startswith("sleep "):
            Path(text.removeprefix("sleep "), str(os.getpid())).touch()
            time.sleep(600)
    return np.array([(len(text), os.getpid()) for text in texts], np.float32).reshape(-1, 2)
