"""D2FT: distributed dynamic fine-tuning of vision transformers on HPC clusters (arXiv 2504.12471)."""

__version__ = "0.1.0"
