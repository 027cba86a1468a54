"""Recipes: their groups and keys; reading, checking and comparing them.

A recipe is a Python file with `get_config() -> ml_collections.ConfigDict`. Each group in it is the keyword arguments of
one function, listed in `groups.GROUPS`. The signature and the docstring of the function define type, default and
meaning of each key. Keys outside of groups are the fields of `groups.Loop`.

The group `init` is for `weights.initial.load`, which is above this folder; `groups.Init` has its keys. That function
takes `normalize` too, to compare it with what the weights expect.
"""
