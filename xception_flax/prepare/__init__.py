"""Data sets are written and checked once here; `data` reads them."""
