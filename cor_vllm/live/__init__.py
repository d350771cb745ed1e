"""A server runs: the endpoint, changes while serving, the prefix cache's key, the metrics."""
