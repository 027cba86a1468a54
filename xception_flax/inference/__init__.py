"""A trained network in use: what it takes, and what it says of images."""
