"""Kinds of layers: how each holds its weight, its rows and its factors."""
