"""Reading, filtering and sorting interactions in bounded memory."""
