"""What people type, before and around Hydra: settings, signals, messages."""
