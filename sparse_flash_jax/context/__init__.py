"""Sequences that are divided over devices: what each holds, and how its queries meet the keys of the others.

Users call `attention.py`, with a `Context` of `division.py` and `Tokens` of `tokens.py`, of which plans are made.
`layout.py` says which positions a device holds, `planning.py` what a device's queries see of other parts, `ring.py` and
`gather.py` bring keys to queries, and `divided_plan.py` tells how much was visible.
"""
