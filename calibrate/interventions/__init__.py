"""What is done to the model, and the loss changes that it causes."""
