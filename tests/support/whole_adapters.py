"""Adapters merged and written by whole tensors, which exports are compared with."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save_file
from torch import Tensor

from ilrec_dist.common.files import write_json
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.peft import (
    CONFIG_FILE,
    PREFIX,
    TABLES,
    WEIGHTS_FILE,
    adapter_config,
    adapter_tensors,
    added_row_tensors,
)
from ilrec_dist.model.lora import Lora, LoraLinear


@torch.no_grad()
def merge_lora(backbone: Backbone) -> None:
    """Add the adapters to the weights, in fp32 and rounded once, and detach them.

    Every rank merges its own shards; nothing is communicated.
    """
    adapters = backbone.lora
    assert isinstance(adapters, Lora)
    for name, weight in backbone.gpt.named_parameters():
        key = name.replace(".", "/")
        if key in adapters.layers:
            layer = adapters.layers[key]
            assert isinstance(layer, LoraLinear)
            weight.copy_(weight.float() + layer.weight_delta())
    adapters.detach()
    backbone.lora = None


def save_adapter(
    backbone: Backbone, folder: str | Path, base: str = "", dtype: torch.dtype | None = None
) -> None:
    """Write the adapters as a folder that `PeftModel` loads; a collective.

    base: what PEFT's configuration records. dtype: of the file; None stands for
    that of the parameters. The rows of added tokens are PEFT's trainable tokens.
    """
    adapters, folder = backbone.lora, Path(folder)
    assert isinstance(adapters, Lora)
    tensors: dict[str, Tensor] = {}
    if parallel_state.get_data_parallel_rank() == 0:
        tensors = adapter_tensors(adapters)
        for name, rows in added_row_tensors(backbone).items():
            tensors[f"{PREFIX}{TABLES[name]}.token_adapter.trainable_tokens_delta"] = rows
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
        tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(folder / CONFIG_FILE, adapter_config(backbone, base))
    dist.barrier()
