"""A run on the disk: its folder, its history, its curves."""
