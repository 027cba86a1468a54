"""Writes and checks data sets, once; `data` reads them."""
