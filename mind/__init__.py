"""mind: distil a teacher's reasoning, from eight perspectives, into a small student."""

__version__ = "0.1.0"
