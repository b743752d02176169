"""Where figures come from: the commit of the code and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

import ilrec_dist


@cache
def commit() -> str:
    """The commit of a checkout, "+" behind it
    where files were changed; else the version.
    """
    root = Path(ilrec_dist.__file__).resolve().parents[1]
    # An installed package may lie within the checkout of something else.
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=9", "--dirty=+"]
        try:
            described = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError:
            described = ""
        if described:
            return described
    return f"version {ilrec_dist.__version__}"


@cache
def machine() -> str:
    """The processor, the cores that this process may use, and the GPUs."""
    models = []
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        pass
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    gpus = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)) or "no GPU"
    cores = len(os.sched_getaffinity(0))
    return f"{models[0] if models else platform.machine()}, {cores} cores, {gpus}"
