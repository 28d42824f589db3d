"""Searches over pipelines: AutoQuant, and accuracy-driven mixed precision."""
