"""Ready pipelines, found by name with fxquant.load_pipeline."""
