"""`hymba bench gpu`: measure.py times, and the other files say what."""
