"""The commands: `run` (Hydra in, pipeline out), `collect`, `convert_checkpoint`. Installed as `sparsefinder.scripts`."""
