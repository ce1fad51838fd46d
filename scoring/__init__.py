"""Measuring a run: held-out prompts, samples, scores and the page that shows them."""
