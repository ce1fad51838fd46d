"""The diffusion process as functions over a callable `denoise(x_t, t)`; nothing here knows a network or a text."""
