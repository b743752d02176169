"""What the cluster is, as stated on the command
line: sizes and speeds with their units.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ilrec_dist.common.errors import UserError

PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
# A unit's name → its factor to bytes, bytes per second or operations per second.
BYTES = {"B": 1.0}
LINK = {"b/s": 1 / 8, "B/s": 1.0}
OPERATIONS = {"FLOP/s": 1.0}


@dataclass(frozen=True)
class Hardware:
    """All speeds are of one GPU, in bytes or operations a second."""

    nodes: int
    gpus_per_node: int
    gpu_memory: float
    # Between nodes, and between the GPUs of one node.
    interconnect: float
    node_link: float
    # What a bare matrix product of the model's sizes reaches, and what the datasheet says.
    gemm: float
    peak: float
    memory_bandwidth: float
    # Of the file system that holds the run's folder, for the whole job.
    disk: float

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


def parse_quantity(text: str, flag: str, units: dict[str, float], example: str) -> float:
    """`80GiB`, `400Gb/s` or `989TFLOP/s` in
    bytes, bytes a second or operations a second.

    Raises UserError that names the flag.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(Ki|Mi|Gi|Ti|k|M|G|T|P|)([A-Za-z/]+)\s*", text)
    factors = PREFIXES | BINARY
    if match is None or match[3] not in units or not float(match[1]) > 0:
        raise UserError(
            f"{flag}: expected a positive number with its unit, such as {example}, found {text!r}"
        )
    return float(match[1]) * factors[match[2]] * units[match[3]]
