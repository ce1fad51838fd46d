"""Images as vectors, the resizing that belongs to them, and statistics of sets of vectors."""
