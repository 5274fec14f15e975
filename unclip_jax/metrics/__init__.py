"""Measures of pictures and embeddings: functions of arrays of features, in float64; no model is known here."""
