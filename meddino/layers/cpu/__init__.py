"""Kernels for float32 on a CPU: `linear` and the vision transformer open the door to them, nothing else knows them."""
