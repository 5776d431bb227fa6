"""What people type, and what Hydra makes of it: options, settings and sweeps in, stages with their settings out."""
