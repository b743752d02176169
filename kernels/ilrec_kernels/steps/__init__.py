"""The steps of one chunk of rows, in the order in which the loop takes them."""
