"""Expected outputs of small random models, made by make.py with transformers and committed."""
