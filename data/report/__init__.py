"""A page about a data set: python -m data.report SOURCE."""
