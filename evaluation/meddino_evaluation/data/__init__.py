"""Labelled data sets on disk, and how they become what a model is trained and measured on."""
