"""Process groups of the tensor- and data-parallel layout."""

import warnings

# Megatron-core announces on import each optional CUDA package that is missing; none is needed. It
# is not imported here, so that reading a configuration does not load it.
warnings.filterwarnings("ignore", module=r"megatron\.")
