"""What a model can do: tasks with answers, asked greedily and scored exactly. Held-out loss is ``glm5.train``'s."""
