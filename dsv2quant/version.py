"""The version of the package, for what is written and shown: nothing below api.py imports the package itself."""

__version__ = "0.1.0"
