"""One step of training or evaluation, all that it is made of, and its state on a disk."""
