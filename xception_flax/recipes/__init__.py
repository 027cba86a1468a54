"""Recipes: the table of their groups, filling in and checking, reading files and overrides.

A recipe is a Python file with `get_config() -> ml_collections.ConfigDict`. Each group in it is the
keywords of exactly one function, named in `groups.GROUPS`: that signature is where a key's default, type
and meaning stand. Keys outside of groups are the fields of `groups.Loop`.
"""
