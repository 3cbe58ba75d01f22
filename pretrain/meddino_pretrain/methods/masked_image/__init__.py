"""Masked autoencoders: a transformer sees a quarter of the patches, a small one behind it paints the others."""
