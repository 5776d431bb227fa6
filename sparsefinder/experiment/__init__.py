"""A pattern with all that it is run with; from settings to objects."""
