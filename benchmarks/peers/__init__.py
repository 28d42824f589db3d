"""The contenders of the step benchmark: scripts that also run in environments without fxquant."""
