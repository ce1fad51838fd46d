"""Moderation of prompts and images; embeddings and encoders are passed in as functions. Import the submodules."""
