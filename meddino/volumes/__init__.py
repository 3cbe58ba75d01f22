"""The one reader of medical files: what a file holds, where its voxels lie in the patient, what its numbers mean."""
