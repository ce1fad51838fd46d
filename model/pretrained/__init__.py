"""Published weights in and out: names of tensors, configurations, files, folders and single files."""
