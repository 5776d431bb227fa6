"""From tables to figures, words and a page."""
