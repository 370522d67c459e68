"""A small pretrained vision transformer that ships with the package."""
