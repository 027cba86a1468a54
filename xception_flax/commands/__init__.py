"""The commands, one file each: arguments, calls and messages."""
