"""Process groups of the tensor- and data-parallel layout."""

import warnings

# Megatron-core announces on import each optional CUDA package that is missing; none is needed.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*(not installed|is deprecated).*")
    import megatron.core.models.gpt  # noqa: F401
