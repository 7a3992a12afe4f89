"""Sequences that are divided over devices: what each holds, and how its queries meet the keys of the others.

`layout.py` says which positions a device holds, `planning.py` what its queries see of other parts, `ring.py` and
`gather.py` bring keys to queries, and `attention.py` is the function that users call.
"""
