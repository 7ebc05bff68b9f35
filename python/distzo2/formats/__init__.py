"""Packed weights in the files that people have: which bytes of which file make up a parameter, and what they mean."""
