"""What a chunk of rows carries from its logits to its gradients."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ilrec_kernels.merge import RankStats, Sent, empty_sent
from ilrec_kernels.pairs import Pairs
from ilrec_kernels.ragged import RaggedHead


@dataclass
class Gradients:
    """Where gradients go; None where none is wanted. The head's is fp32 (fp64 for fp64 inputs)."""

    hidden: list[Tensor | None]
    head: Tensor | None
    scale: Tensor  # [N]: what each row's loss is multiplied by


@dataclass
class Chunk:
    """The state of rows [begin, end) between the statistics and the gradients."""

    begin: int
    end: int
    x: Tensor  # [S, n, d]
    y: Tensor  # [n] local column of the target; 0 where another rank owns it
    owned: Tensor  # bool [n]
    row: Tensor  # arange(n)
    pairs: Pairs | None = None  # of the whole vocabulary
    local: Pairs | None = None  # of this rank's shard
    ragged: RaggedHead | None = None
    z_final: Tensor | None = None  # [n, c]: logits, then e^(z − max) without the sent candidates, then gradients
    z_layers: Tensor | None = None  # [m, n, c]: logits, then e^(z − max) over the distill columns, then gradients
    p_final: Tensor | None = None  # [P]: the same at the pairs
    p_layers: Tensor | None = None  # [m, P]
    teacher: Tensor | None = None  # e^(z − max) of the final layer over the distill scope: [n, c], or [P]
    sent: Sent = field(default_factory=empty_sent)
    stats: RankStats | None = None

    @property
    def n(self) -> int:
        return self.end - self.begin
