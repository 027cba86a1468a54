"""Runs a table of claims, several settings of one recipe each, and says which the results support."""
