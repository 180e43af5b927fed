"""The controlled study: one recipe, many architectures (paper, tables 1 and 3), at any size.

arms.py     the architectures, each one change away from another, with matched parameters
paper.py    what the paper measured
tasks.py    what is learned beside the text: recall in several forms, made without downloads
"""
