"""Networks on top of features: decoders, predictors, heads."""
