"""Studies: a grid of runs, and the one table that is made from them."""
