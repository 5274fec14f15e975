"""Measures of pictures: whether they are what their captions claim."""
