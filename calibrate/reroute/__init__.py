"""The router update: trains the router of the last MoE layer to take better routes."""
