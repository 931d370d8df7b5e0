"""glm5's ops inside other people's models. Import the one you need; each says what it must have installed."""
