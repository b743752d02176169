"""The tensor-parallel decoder whose intermediate layers can be read."""

# Silences what Megatron-core announces on import.
import ilrec_dist.distributed  # noqa: F401
