"""The mathematics: thin-factor matrices, the relations, their scores. Never sees a module."""
