"""Scenes of coloured shapes, rendered on the fly, with captions whose truth can be checked."""
