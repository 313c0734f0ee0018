"""MLflow: runs, the model flavor, the registry."""
