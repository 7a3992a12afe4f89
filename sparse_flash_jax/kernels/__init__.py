"""Attention over runs of keys: what a kernel must do, and the implementations that do it."""
