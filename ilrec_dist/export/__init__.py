"""A run's data in the files of other systems."""
