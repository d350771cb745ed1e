"""An engine starts: flags, options, the checks before it, and the router of every MoE layer."""
