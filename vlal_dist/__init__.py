"""Vision-language assisted attribute learning at any scale."""

__version__ = "0.1.0"
