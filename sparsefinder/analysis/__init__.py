"""From tables of counts to frontiers, intervals and differences."""
