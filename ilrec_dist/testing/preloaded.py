"""What the processes of `run_distributed` are forked with."""

import gc
import os

# Looking for garbage would take a fifth of the time of these imports, and is left out at the end
# too: what is imported stays.
gc.disable()

import torch  # noqa: E402

import ilrec_dist.pipeline.worker_tasks  # noqa: E402, F401
from ilrec_dist.distributed.deepspeed_mpu import import_deepspeed  # noqa: E402

# It chooses between devices when it is imported, and here there is no choice.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import_deepspeed()

gc.freeze()
gc.enable()
