"""What encoders and decoders are made of."""
