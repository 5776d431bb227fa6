"""From tables to figures, words and HTML."""
