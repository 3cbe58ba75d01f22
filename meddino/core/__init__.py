"""What every part stands on: errors, config, seeds, logging, files on disk. Imports nothing of the project."""
