"""Measures of a set of videos against another set: Frechet distance, precision and recall, STREAM."""
