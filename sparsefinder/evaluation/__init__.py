"""What the stage `evaluate` measures with."""
