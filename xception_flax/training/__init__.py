"""One step of training or evaluation, the parts of it, and the state on the disk."""
