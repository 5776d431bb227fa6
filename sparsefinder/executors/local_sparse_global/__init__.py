"""Local, sparse and global attention, which pools keys and so has an executor of its own."""
