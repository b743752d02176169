"""All weights of a backbone on every rank, for comparisons of small models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.sharding import shard_spec


def full_state_dict(backbone: Backbone) -> dict[str, Tensor]:
    """All weights unsharded, fp32 on the CPU, under the same names for every tp.

    A collective over the tensor-parallel group. Adapters are not part of it.
    """
    backbone.write_trained_rows()
    group, state = backbone.tp_group, {}
    for name, parameter in backbone.gpt.named_parameters():
        spec, shard = shard_spec(name, backbone.config), parameter.detach().float().contiguous()
        if spec is None or group.size() == 1:
            state[name] = shard.clone()
            continue
        shards = [torch.empty_like(shard) for _ in range(group.size())]
        dist.all_gather(shards, shard, group=group)
        state[name] = spec.join(shards)
    return state


@torch.no_grad()
def load_full_state_dict(backbone: Backbone, state: Mapping[str, Tensor]) -> None:
    """Load what `full_state_dict` returned under any tp."""
    tp, rank = backbone.tp_group.size(), backbone.tp_group.rank()
    for name, parameter in backbone.gpt.named_parameters():
        spec = shard_spec(name, backbone.config)
        parameter.copy_(state[name] if spec is None else spec.slice(state[name], rank, tp))
    if backbone.trained_rows is not None:
        backbone.trained_rows.read_from(backbone.vocabulary_tables)
