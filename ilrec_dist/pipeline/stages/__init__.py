"""One file a stage of a run: its declaration and its body."""
