"""The three-stage self-supervised trainer: `meddino-pretrain`."""
