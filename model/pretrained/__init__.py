"""Reading and writing published weights: tensor names, configurations, files, folders and single files."""
