"""Hymba beside other engines on the same machine, in the same seconds: transformers and llama.cpp, random weights."""
