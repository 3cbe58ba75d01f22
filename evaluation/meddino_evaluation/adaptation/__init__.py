"""What is learnt on top of a backbone: kNN, linear heads, LoRA, fine-tuning."""
