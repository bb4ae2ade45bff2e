"""What the losses and the training cost on this machine."""
