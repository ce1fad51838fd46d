"""Sources of captioned images, and the order, loading and tokenizing that turn them into batches."""
