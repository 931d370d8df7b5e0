"""Evaluation: held-out loss, and how good a selection of keys is. Changes no weight."""
