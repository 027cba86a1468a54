"""The commands, a file each: arguments, calls and words."""
