"""What is known of models and their blocks: README.md beside."""
