"""The corpus as it lies on disk (one definition for writer and reader), the intensities of each modality, geometry."""
