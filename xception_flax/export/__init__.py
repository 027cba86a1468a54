"""A trained network leaves: programs for JAX, ONNX Runtime, TensorFlow and LiteRT, each in a file of its own format."""
