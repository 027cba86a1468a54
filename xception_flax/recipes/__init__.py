"""Recipes: their groups and keys, reading their files and overrides, filling in and checking.

A recipe is a Python file with `get_config() -> ml_collections.ConfigDict`. Each group in it feeds exactly one function,
named in `groups.GROUPS`: that signature is where a key's default, type and meaning stand, between `/` and `*`. Keys
outside of groups are the fields of `groups.Loop`.
"""
