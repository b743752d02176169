"""The memory that a training took, noted in its folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from ilrec_dist.common.files import write_json
from ilrec_dist.common.run_layout import USAGE
from ilrec_dist.distributed.layout import ParallelState

PEAK = "peak_memory_bytes"


def note_peak_memory(folder: Path, parallel: ParallelState) -> None:
    """Write the largest worker's peak so far, or the
    one of an earlier attempt where that is more.

    Collective over all workers.
    """
    peaks: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, peak_memory(parallel.device))
    if dist.get_rank() == 0:
        write_json(folder / USAGE, {PEAK: max(*peaks, read_peak_memory(folder) or 0)})


def read_peak_memory(folder: Path) -> int | None:
    """What `note_peak_memory` wrote, None where it wrote nothing."""
    try:
        return int(json.loads((folder / USAGE).read_text(encoding="utf-8"))[PEAK])
    except (OSError, ValueError, KeyError):
        return None


def peak_memory(device: torch.device) -> int:
    """Bytes of this process: allocated on its
    GPU at most, or resident at most on a CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10
