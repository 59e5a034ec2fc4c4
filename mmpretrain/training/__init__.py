"""Training: the LightningModule, optimizers, callbacks."""
