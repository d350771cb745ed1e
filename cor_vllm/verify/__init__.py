"""A server is doubted: what happens in its MoE layers, compared with what the scores file says."""
