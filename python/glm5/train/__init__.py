"""Training: the loop, the optimizers, checkpoints, and the stages that a recipe strings together."""
