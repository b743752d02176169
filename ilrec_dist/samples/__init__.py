"""Training samples: windows of histories, batches, prefetching."""
