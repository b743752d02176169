"""What the processes of `run_distributed` are forked with."""

import gc

# Looking for garbage would take a fifth of the time of these imports, and is left out at the end
# too: what is imported stays.
gc.disable()

import ilrec_dist.pipeline.worker_tasks  # noqa: E402, F401

gc.freeze()
gc.enable()
