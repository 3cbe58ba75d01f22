"""Kernels for float32 on a CPU; nothing outside this folder knows them."""
