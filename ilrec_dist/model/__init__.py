"""The tensor-parallel decoder whose intermediate layers can be read, on CPU and CUDA alike."""

import ilrec_dist.distributed  # noqa: F401  # Imports Megatron-core without its warnings.
