"""GRU4Rec and Caser: next-item models that
are trained beside SASRec, on the same split.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ilrec_dist.cf.config import CFConfig

INIT_STD = 0.02
# Caser: the items that a window holds (L of the paper), and the filters of each shape.
WINDOW, HORIZONTAL_FILTERS, VERTICAL_FILTERS = 5, 16, 4


class SequenceModel(nn.Module):
    """A model whose logits are products of a query with a table of all items."""

    @property
    @abstractmethod
    def table(self) -> Tensor:
        """fp32 [num_items, q]; a query's product
        with an item's row is the item's logit.
        """

    @abstractmethod
    def forward(self, items: Tensor, users: Tensor, rows: Tensor) -> Tensor:
        """Queries fp32 [R, q] of some positions.

        items int64 [B, S], chronological and padded on the right
        with any item; users int64 [B]; rows int64 [R], flat in
        B·S. The query at a position has seen the items up to it.
        """


class GRU4Rec(SequenceModel):
    """A recurrent network over item vectors (arXiv 1511.06939, and 1606.08117).

    Item vectors go through a GRU without biases and a linear map back
    to their width; the logits are products with the item vectors.
    """

    def __init__(self, config: CFConfig, num_items: int, num_users: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.items = nn.Embedding(num_items, width)
        self.dropout = nn.Dropout(config.dropout)
        self.gru = nn.GRU(width, width, bias=False, batch_first=True)
        self.dense = nn.Linear(width, width)
        nn.init.normal_(self.items.weight, std=INIT_STD)

    @property
    def table(self) -> Tensor:
        return self.items.weight

    def forward(self, items: Tensor, users: Tensor, rows: Tensor) -> Tensor:
        # Scaled as in SASRec, so that small vectors drive the gates.
        vectors = self.dropout(self.items(items) * self.items.embedding_dim**0.5)
        states, _ = self.gru(vectors)
        return cast(Tensor, self.dense(states.flatten(0, 1)[rows]))


class Caser(SequenceModel):
    """Convolutions over the latest WINDOW items, as an image (arXiv 1809.07426).

    Horizontal filters of every height 1 … WINDOW span the whole width, go through ReLU
    and keep their maximum over the positions; vertical filters weigh the items of the
    window. A linear map and ReLU make z of both, and the logits are W'·[z; P_u] + b'
    with the user's vector P_u.
    """

    def __init__(self, config: CFConfig, num_items: int, num_users: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.items = nn.Embedding(num_items, width)
        self.users = nn.Embedding(num_users, width)
        self.horizontal = nn.ModuleList(
            nn.Conv1d(width, HORIZONTAL_FILTERS, height) for height in range(1, WINDOW + 1)
        )
        self.vertical = nn.Linear(WINDOW, VERTICAL_FILTERS)
        self.dropout = nn.Dropout(config.dropout)
        self.dense = nn.Linear(WINDOW * HORIZONTAL_FILTERS + VERTICAL_FILTERS * width, width)
        # W' and, in the last column, b'.
        self.output = nn.Parameter(torch.empty(num_items, 2 * width + 1))
        for weight in (self.items.weight, self.users.weight, self.output):
            nn.init.normal_(weight, std=INIT_STD)
        with torch.no_grad():
            self.output[:, -1] = 0.0

    @property
    def table(self) -> Tensor:
        return self.output

    def forward(self, items: Tensor, users: Tensor, rows: Tensor) -> Tensor:
        length = items.shape[1]
        vectors = self.items(items) * self.items.embedding_dim**0.5
        # Before a history's first item stand vectors of zeros.
        vectors = F.pad(vectors, (0, 0, WINDOW - 1, 0))
        windows = vectors.unfold(1, WINDOW, 1).flatten(0, 1)[rows]  # [R, d, WINDOW]
        maxima = [F.relu(filters(windows)).amax(2) for filters in self.horizontal]
        weighed = self.vertical(windows).flatten(1)
        z = F.relu(self.dense(self.dropout(torch.cat([*maxima, weighed], 1))))
        of_user = self.users(users)[rows // length]
        return torch.cat([z, of_user, z.new_ones(len(z), 1)], 1)


MODELS: dict[str, type[GRU4Rec] | type[Caser]] = {"gru4rec": GRU4Rec, "caser": Caser}
