"""Programs for machines that need not be here: compiled, counted, estimated."""
