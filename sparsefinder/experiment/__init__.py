"""A pattern with everything around it; from settings to objects."""
