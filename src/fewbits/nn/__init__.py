"""Layers bound to kernels and to a back end's operations. They know neither formats nor names, nor NumPy."""
