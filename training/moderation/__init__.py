"""The stage that trains the classifier of prompts, from labelled text to the shipped files."""
