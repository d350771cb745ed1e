"""The version of this package, where every module can read it without importing the front door."""

__version__ = "0.1.0"
