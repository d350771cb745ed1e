"""What routing does to a model's answers, beside the methods it is compared with."""
