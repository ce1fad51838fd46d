"""Moderation of prompts and pictures. Embeddings and encoders arrive as functions. Import from the submodules."""
