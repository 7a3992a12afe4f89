"""Sequences that are divided over devices: what each holds, and how its queries meet the keys of the others.

`layout.py` says which positions a device holds, `tokens.py` what plans are made of, `planning.py` what a device's
queries see of other parts, `ring.py` and `gather.py` bring keys to queries, and `attention.py` is what users call.
"""
