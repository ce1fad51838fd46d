"""Networks that turn images into vectors, their resizing, and statistics of sets of vectors."""
