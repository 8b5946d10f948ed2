"""Models on disk: folders of safetensors files, dampened as a family, piece by piece."""
