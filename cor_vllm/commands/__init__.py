"""What all commands share: their arguments, how they end, the processes that they start."""
