"""What frozen patch tokens tell of the labels beneath them, measured in seconds."""
