"""The corpus as it lies on disk (one definition for writer and reader), HU windows, geometry, the input contract."""
