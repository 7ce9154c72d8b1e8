"""Hooks: a model's forward passes are followed, and the gradients that arrive are handed on."""
