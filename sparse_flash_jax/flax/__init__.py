"""Flax modules and adapters over `sparse_attention`: import `nnx` or `linen` from here, on demand.

`pattern.py` and `patterns/` describe what a layer sees, `auto.py` chooses a pattern by the time to expect, `heads.py`
applies it to projected heads, `cache.py` and `decode.py` to one more token at a time, `adapter.py` fits it into Flax's
own attention layers; `nnx.py` and `linen.py` hold the modules.
"""
