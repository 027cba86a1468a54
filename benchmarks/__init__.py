"""What this network costs on a CPU, next to what one would use instead. See README.md here; nothing imports this."""
