"""The families of models: one file each, a builder and the published sizes."""
