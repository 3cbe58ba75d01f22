"""Files of one volume: NIfTI, NRRD and MetaImage."""
