"""Training of the language model: one file for each noun, put together by train.py."""
