"""What lies on disk, who wrote it, and whether it can be trusted."""
