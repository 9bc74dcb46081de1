"""A small language model for market news, made from scratch: see README.md for the way through."""
