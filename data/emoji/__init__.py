"""Emoji in five styles, and scenes composed of them."""
