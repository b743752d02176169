"""DeepSpeed over Megatron's groups.

`import_deepspeed().initialize(mpu=DeepSpeedMPU(), dist_init_required=False, …)`
"""

from __future__ import annotations

from types import ModuleType

import torch.distributed as dist
from megatron.core import parallel_state

from ilrec_dist.common.loading import uncollected_imports


class DeepSpeedMPU:
    """Megatron's groups under DeepSpeed's names.

    There is no pipeline, so that model parallel is tensor parallel.
    """

    def get_model_parallel_rank(self) -> int:
        return int(parallel_state.get_tensor_model_parallel_rank())

    def get_model_parallel_world_size(self) -> int:
        return int(parallel_state.get_tensor_model_parallel_world_size())

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        return group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return int(parallel_state.get_data_parallel_rank())

    def get_data_parallel_world_size(self) -> int:
        return int(parallel_state.get_data_parallel_world_size())

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup = parallel_state.get_data_parallel_group()
        return group


def import_deepspeed() -> ModuleType:
    """Import DeepSpeed and keep it from compiling its shared-memory collectives.

    They would take a minute of C++ at the first start, and training does not use them.
    Call `initialize_parallel` first: on a CPU run it keeps DeepSpeed from taking a GPU
    that it finds.
    """
    with uncollected_imports():
        # Inside the function because importing DeepSpeed takes seconds and chooses the accelerator.
        import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    module: ModuleType = deepspeed
    return module
