"""DICOM: what headers say, which files make one volume, and its pixels."""
