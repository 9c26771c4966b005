"""The trainer: settings, data, models, the loop, checkpoints, records."""
