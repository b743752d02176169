"""The tensor-parallel decoder whose intermediate layers can be read."""

import ilrec_dist.distributed  # noqa: F401  # Imports Megatron-core without its warnings.
