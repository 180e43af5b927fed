"""The architecture: read `hymba.py` first."""
