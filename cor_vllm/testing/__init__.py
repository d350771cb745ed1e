"""What tests, benchmarks and examples share: a server to start, tiny models, made-up scores files."""
