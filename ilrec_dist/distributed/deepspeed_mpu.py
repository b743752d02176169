"""DeepSpeed over Megatron's groups: `import_deepspeed().initialize(mpu=DeepSpeedMPU(), dist_init_required=False, …)`."""

from __future__ import annotations

from types import ModuleType

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


def import_deepspeed() -> ModuleType:
    """DeepSpeed, told not to compile its shared-memory collectives at the first start (a minute of C++ that training does not use).

    Call `initialize_parallel` first: on a CPU run it keeps DeepSpeed from taking a GPU that it finds.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
