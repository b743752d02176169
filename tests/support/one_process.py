"""Commands whose one worker is their own process.

A worker that torchrun starts takes five seconds of a core more, and is
not what a test of a study's cells is about.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import torch.distributed as dist

from ilrec_dist.cli.main import main
from ilrec_dist.launch import workers
from ilrec_dist.launch.config import LaunchConfig
from ilrec_dist.launch.job import Job, run_job

ROOT = Path(__file__).parents[2]


def write_interpreter(path: Path) -> str:
    """Write a program that takes Python's place in
    `python -m ilrec_dist.cli WORDS`; returns its name.
    """
    lines = [
        f"#!{sys.executable}",
        # Of the seconds that its imports take, looking for garbage would be one fifth.
        "import gc, sys",
        "gc.disable()",
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]",
        "from tests.support.one_process import run_command",
        "run_command()",
    ]
    path.write_text("\n".join(lines))
    path.chmod(0o755)
    return str(path)


def run_command() -> None:
    """Run the command of this process, behind `-m ilrec_dist.cli`."""
    workers.ENGINES["torchrun"] = _run_here
    code = main(sys.argv[3:])
    # What it has imported need not be looked through at its end either.
    gc.freeze()
    sys.exit(code)


def _run_here(launch: LaunchConfig, job: Job) -> None:
    assert launch.workers == 1
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        run_job(job)
    finally:
        dist.destroy_process_group()
