"""Does counterfactual routing help? Benchmarks under every condition, on the same items."""
