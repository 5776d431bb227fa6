"""What was learned from queries and keys: load it, apply it, and the loops that learn it."""
