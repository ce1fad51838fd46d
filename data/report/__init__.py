"""An HTML report about a data set: python -m data.report SOURCE."""
