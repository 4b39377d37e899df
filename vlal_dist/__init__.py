"""Vision-language assisted attribute learning at any scale; importing this imports nothing heavy."""

__version__ = "0.1.0"
