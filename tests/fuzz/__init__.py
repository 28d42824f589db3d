"""Random programs, from their description to a verdict: capture, prepare, calibrate, export, onnxruntime, parity."""
