"""Scenes of coloured shapes, drawn on the fly, with captions whose truth can be checked."""
