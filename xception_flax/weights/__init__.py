"""Weights to begin with: of this project's runs, and of other libraries' files."""
