"""Batches of learned tiles, decoded where their pixels are wanted: on the CPU or a CUDA device."""
