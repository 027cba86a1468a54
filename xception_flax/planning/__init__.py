"""Programs for machines that are not there: compiled, counted, estimated."""
