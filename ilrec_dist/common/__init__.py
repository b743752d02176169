"""What every package may use: errors, files, console, names of a run's files."""
