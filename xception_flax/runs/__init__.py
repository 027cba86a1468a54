"""A run on a disk: its folder, its history, its curves."""
