"""What a backbone's features are worth: kNN, linear, few-shot, LoRA and fine-tuning on labelled images and volumes."""
