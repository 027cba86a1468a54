"""Data sets written once and checked, for `data` to read ever after."""
