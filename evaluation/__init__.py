"""What evaluate.py does, step by step: prompts, samples, scores, pages."""
