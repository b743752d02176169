"""What the readers of the formats share: streams, lines, delimited text, columns, item tables."""
