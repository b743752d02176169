"""What DeepSpeed asks of a model-parallel unit, answered from Megatron's groups: `deepspeed.initialize(mpu=DeepSpeedMPU())`."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state


class DeepSpeedMPU:
    """Megatron's tensor-parallel group under DeepSpeed's names; there is no pipeline, so model parallel is tensor parallel."""

    def get_model_parallel_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    def get_model_parallel_world_size(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return parallel_state.get_data_parallel_rank()

    def get_data_parallel_world_size(self) -> int:
        return parallel_state.get_data_parallel_world_size()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group()
