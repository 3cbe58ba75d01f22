"""What is measured on a predicted label map against a reference: overlap, surfaces, volumes."""
