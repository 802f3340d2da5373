"""Entropy coding of integer symbols: rANS over shipped integer tables.

``tables`` validates the tables, ``reference`` is the coder as the specification has it in plain
Python, ``kernel`` is the same coder compiled; both give identical bytes (docs/format.md, "rANS").
"""
