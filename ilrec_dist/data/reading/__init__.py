"""What the readers of the formats share.

Streams, lines, delimited text, columns, item tables.
"""
