"""MLflow: tracked runs, the model flavor, the model registry."""
