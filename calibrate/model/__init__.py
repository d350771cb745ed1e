"""The model that is measured: its families, loading, routing, and the memory that it may take."""
