"""Process group and collectives: one process, DDP or FSDP2 with the same code on CPU and accelerator."""
