"""Sources of captioned images that lie in files."""
