"""The process and the machine it runs on: signals, memory, devices, files, other processes."""
