"""What an estimate is about: models, their checkpoints, loss and data."""
