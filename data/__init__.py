"""Sources of captioned images, and what turns them into batches. Import from the submodules."""
