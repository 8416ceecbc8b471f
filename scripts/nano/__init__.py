"""The parts of ``scripts/build_nano.py``: drawing, text encoder, autoencoder, transformer, scores."""
