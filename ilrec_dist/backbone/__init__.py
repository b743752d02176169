"""The tensor-parallel decoder: Megatron-core's GPT with layer taps and beam decoding, on CPU and CUDA alike."""

import warnings

with warnings.catch_warnings():  # Megatron-core announces on import each optional CUDA package that is not there; none is needed
    warnings.filterwarnings("ignore", message=".*(not installed|is deprecated).*")
    import megatron.core.models.gpt  # noqa: F401
