"""Embed a whole data set into files, and search in them."""
